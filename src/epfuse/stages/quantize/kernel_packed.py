"""FP8 rows with one scale each, or one for each of their groups, packed in the route table's order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from epfuse.kernel_cache import cached
from epfuse.stages.gather.kernel import note_row, route_at, row_of
from epfuse.stages.quantize.kernel import inverse_of, quantize_block, scale_above, shared_scale, widen


@triton.jit
def packed_row(block_row, slot, slots, BLOCK_M: tl.constexpr):
    """Where the row of a slot of the table lies."""
    return tl.load(block_row + slot // BLOCK_M, mask=slot < slots, other=0) + slot % BLOCK_M


@triton.jit
def source_of(route, row, K: tl.constexpr):
    """The row of x that a route reads."""
    source = row
    if K > 0:
        source = route // K
    return source


@triton.jit
def numbers_of(codes, HARDWARE: tl.constexpr):
    """E4M3 codes -> float32; by bits where HARDWARE is off: the interpreter's conversion knows no such type."""
    if HARDWARE:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        magnitude = codes.to(tl.int32) & 0x7F
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        numbers = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # multiples of 2^-9
        numbers = tl.where(magnitude == 0x7F, float("nan"), numbers)
    return numbers


@triton.jit
def length_of(codes, scale, HARDWARE: tl.constexpr):
    """Euclidean length of the row [1, G] of these codes with one scale [1], at most 3.4e38; NaN where codes are."""
    numbers = numbers_of(codes, HARDWARE)
    unit = tl.maximum(scale.to(tl.int32) << 23, 0x400000).to(tl.float32, bitcast=True)  # byte 0 is 2^-127, a subnormal
    length = tl.sqrt(tl.sum(tl.sum(numbers * numbers, 1), 0)) * tl.max(unit, 0)
    return tl.where(length > 3.4e38, 3.4e38, length)


@triton.jit
def bound_of(length, longest, activation):
    """What no value of a bounded SwiGLU-OAI exceeds in magnitude, for a row of x of this length.

    A scalar product is at most the product of both lengths. The narrow sums of the tensor cores and the rounding of
    gate and up may add to it, a sixteenth at most. A negative gate gives at most 0.28 / alpha, which is below limit
    (`epfuse.config.SwiGLUOAI.bounded`), times the same.

    Args:
        length: float32.
        longest: pointer to the lengths of the expert's longest gate row and longest up row.
        activation: alpha, beta, limit.
    """
    _, beta, limit = activation
    gate = length * tl.load(longest) * 1.0625
    up = length * tl.load(longest + 1) * 1.0625
    gate = tl.where(gate > limit, limit, gate)  # not by a minimum, which may lose NaN
    up = tl.where(up > limit, limit, up)
    return gate * (up + tl.abs(beta))


@triton.jit
def quantize_row(x, HARDWARE: tl.constexpr):
    """quantize_block of the runs of a row, rounded up; HARDWARE: by the GPU's conversion, which rounds alike."""
    if HARDWARE:
        scale, finite = shared_scale(x.to(tl.int32, bitcast=True))
        codes = (x * tl.expand_dims(inverse_of(scale), -1)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        codes = tl.where(tl.expand_dims(finite, -1), codes, 0x7F)
        scale = tl.where(finite, scale, 255).to(tl.uint8)
    else:
        codes, scale = quantize_block(x, False)
    return codes, scale


@cached
@triton.jit(do_not_specialize=["R", "lone_stored"])
def quantize_packed_kernel(
    x, codes, scales, route_row, lone_token, topk_ids, expert_map, sorted_routes, block_row, num_padded,
    R, E, H, lone_stored, next_scales, longest, block_expert, activation,
    L: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, SPREAD: tl.constexpr, HARDWARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """codes[row of a route], scales[row] of x[route // K], or of x[row] if K is 0: then x lies packed already.

    A scale for each GROUP values of a row; for all of it where GROUP is BLOCK_H. Rows of codes are SPREAD * H apart.
    next_scales[row], if asked for: of what gate_up makes of the row, whose expert the table's block_expert tells; such
    that no value exceeds E4M3 in it. longest: FP32 [L, 2], as bound_of takes an expert's; activation too.
    A row at a time; each program takes every num_programs-th slot. route_row, lone_token and lone_stored as
    note_row.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next kernel reads the route table at once
    columns = tl.arange(0, BLOCK_H)
    inside = columns < H
    groups = tl.arange(0, BLOCK_H // GROUP)
    scales_of_row = tl.cdiv(H, GROUP)
    slots = tl.load(num_padded)
    programs = tl.num_programs(0)
    first = tl.program_id(0)
    route = route_at(sorted_routes, first, slots, R)
    row = packed_row(block_row, first, slots, BLOCK_M)
    next_route = route_at(sorted_routes, first + programs, slots, R)
    next_row = packed_row(block_row, first + programs, slots, BLOCK_M)
    values = row_of(x, source_of(route, row, K), H, inside, route, R)
    for slot in range(first, slots, programs):
        # one row ahead, as gather_kernel
        next_values = row_of(x, source_of(next_route, next_row, K), H, inside, next_route, R)
        second_route = route_at(sorted_routes, slot + 2 * programs, slots, R)
        second_row = packed_row(block_row, slot + 2 * programs, slots, BLOCK_M)
        if route < R:
            note_row(route_row, lone_token, lone_stored, topk_ids, expert_map, route, row, R, E, L, K, K_LANES)
            code, scale = quantize_row(tl.reshape(widen(values), (BLOCK_H // GROUP, GROUP)), HARDWARE)
            tl.store(codes + row.to(tl.int64) * (H * SPREAD) + columns, tl.reshape(code, (BLOCK_H,)), mask=inside)
            tl.store(scales + row.to(tl.int64) * scales_of_row + groups, scale, mask=groups < scales_of_row)
            if next_scales is not None:
                expert = tl.load(block_expert + slot // BLOCK_M)
                bound = bound_of(length_of(code, scale, HARDWARE), longest + expert * 2, activation)
                byte, finite = scale_above(bound.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # NaN may have a sign
                tl.store(next_scales + row, tl.where(finite, byte, 255).to(tl.uint8))
        route = next_route
        next_route = second_route
        row = next_row
        next_row = second_row
        values = next_values
