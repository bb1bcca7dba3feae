"""What stands around DeepGEMM's two grouped products: rows packed and quantised, the activation, the sum."""

import triton
import triton.language as tl

from epfuse.stages.activation import activate
from epfuse.stages.quantize.kernel import widen
from epfuse.stages.quantize.kernel_packed import quantize_row


@triton.jit
def numbers_of(scales):
    """E8M0 bytes -> FP32, the byte of NaN -> infinity."""
    return tl.maximum(scales.to(tl.int32) << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def store_row(x, codes, scales, row, H, ROWS, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, HARDWARE: tl.constexpr):
    """Store FP32 x [BLOCK_H] as row ``row`` of codes [ROWS, H], and its scales of scales [H / GROUP, ROWS]."""
    columns = tl.arange(0, BLOCK_H)
    groups = tl.arange(0, BLOCK_H // GROUP)
    code, scale = quantize_row(tl.reshape(x, (BLOCK_H // GROUP, GROUP)), HARDWARE)
    tl.store(codes + row * H + columns, tl.reshape(code, (BLOCK_H,)), mask=columns < H)
    tl.store(scales + groups * ROWS + row, numbers_of(scale), mask=groups < H // GROUP)


@triton.jit
def pack_kernel(
    x, codes, scales, group_of_row, row_of_route, sorted_routes, block_expert, num_padded, R, H, ROWS,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Row p of the table's order is x[route // K]; its expert, -1 past the last block; and where each route lies."""
    row = tl.program_id(0).to(tl.int64)
    used = row < tl.load(num_padded)
    tl.store(group_of_row + row, tl.load(block_expert + row // BLOCK_M, mask=used, other=-1))
    route = tl.load(sorted_routes + row, mask=used, other=R)
    if route < R:
        columns = tl.arange(0, BLOCK_H)
        values = tl.load(x + (route // K).to(tl.int64) * H + columns, mask=columns < H, other=0.0)
        store_row(widen(values), codes, scales, row, H, ROWS, BLOCK_H, GROUP, HARDWARE)
        tl.store(row_of_route + route, row.to(tl.int32))


@triton.jit
def activate_rows_kernel(
    gate_up, codes, scales, sorted_routes, num_padded, R, I, ROWS, activation,
    BLOCK_I: tl.constexpr, GROUP: tl.constexpr, HARDWARE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The activation of gate_up [ROWS, 2I], quantised."""
    row = tl.program_id(0).to(tl.int64)
    used = row < tl.load(num_padded)
    if tl.load(sorted_routes + row, mask=used, other=R) < R:
        columns = tl.arange(0, BLOCK_I)
        source = gate_up + row * 2 * I + columns
        gate = widen(tl.load(source, mask=columns < I, other=0.0))
        up = widen(tl.load(source + I, mask=columns < I, other=0.0))
        y = tl.where(columns < I, activate(gate, up, activation, ACTIVATION), 0.0)
        store_row(y, codes, scales, row, I, ROWS, BLOCK_I, GROUP, HARDWARE)


@triton.jit
def add_rows_kernel(rows, topk_weights, topk_ids, slots, row_of_route, out, H, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """out[t] is the sum over t's local routes, each times its router weight."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(K):
        route = token * K + k
        if tl.load(slots + tl.load(topk_ids + route)) >= 0:
            row = tl.load(row_of_route + route).to(tl.int64)
            values = tl.load(rows + row * H + columns, mask=columns < H, other=0.0)
            total += widen(values) * tl.load(topk_weights + route)
    tl.store(out + token * H + columns, total.to(out.dtype.element_ty), mask=columns < H)
