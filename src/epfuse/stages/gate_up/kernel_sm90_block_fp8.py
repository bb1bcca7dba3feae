"""Grouped GEMM1 for Hopper with FP8 rows and block FP8 weights; the activation's results are FP8 rows again."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.activation import activate
from epfuse.stages.quantize.kernel import inverse_of, scale_above
from epfuse.stages.sm90_block_fp8_gemm import BLOCK, run_tiles
from epfuse.stages.sm90_gemm import let_next_kernel_start


@gluon.jit
def activated(gate, up, bias, expert, first_output, I, activation, ACTIVATION: gl.constexpr):
    """Sums of gate and up rows, with their biases, -> FP32. They are rounded first, as if they were stored between."""
    if bias is not None:
        rows = gl.arange(0, gate.shape[0], layout=gl.SliceLayout(1, gate.type.layout))
        bias += expert.to(gl.int64) * 2 * I + first_output
        gate += gl.load(bias + rows)[:, None]
        up += gl.load(bias + I + rows)[:, None]
    gate = gate.to(gl.bfloat16).to(gl.float32)
    up = up.to(gl.bfloat16).to(gl.float32)
    return activate(gate, up, activation, ACTIVATION, ONE_DIVISION=True)


@gluon.jit
def largest(y):
    """The bit pattern of the largest magnitude of each column."""
    return gl.max(y.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@gluon.jit
def store_codes(y, scale, finite, block_routes, first_row, first_output, codes, I, R):
    """Columns of y [outputs, columns] as E4M3 rows; the hardware rounds to nearest even, as quantize_block does."""
    OUTPUTS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    ACROSS: gl.constexpr = OUTPUTS // 16
    rounded = (y * inverse_of(scale)[None, :]).to(gl.float8e4nv).to(gl.uint8, bitcast=True)
    nans = gl.full([OUTPUTS, COLUMNS], 0x7F, gl.uint8, layout=y.type.layout)
    rounded = gl.where((finite != 0)[None, :], rounded, nans)
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [ACROSS, 32 // ACROSS], [1, gl.num_warps()], [0, 1])
    result = gl.convert_layout(rounded, layout)
    outputs = first_output + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    live = gl.load(block_routes + column) < R
    where = (first_row + column).to(gl.int64)[None, :] * I + outputs[:, None]
    gl.store(codes + where, result, mask=live[None, :] & (outputs < I)[:, None], eviction_policy="evict_last")


@gluon.jit
def store_activated_rows(
    sums, block_routes, first_row, expert, n, R, args, ACTIVATION: gl.constexpr, COUNT: gl.constexpr
):
    """Activate a group of outputs, quantise them and store them with their scale: the tile has all of the group."""
    bias, codes, scales, I, activation = args
    HALF: gl.constexpr = COUNT // 2
    first_output = n * BLOCK
    first = activated(sums[0], sums[HALF], bias, expert, first_output, I, activation, ACTIVATION)
    second = first
    amax = largest(first)
    if HALF == 2:
        second = activated(sums[1], sums[3], bias, expert, first_output + BLOCK // 2, I, activation, ACTIVATION)
        amax = gl.maximum(amax, largest(second))
    scale, finite = scale_above(amax)
    store_codes(first, scale, finite, block_routes, first_row, first_output, codes, I, R)
    if HALF == 2:
        store_codes(second, scale, finite, block_routes, first_row, first_output + BLOCK // 2, codes, I, R)
    column = gl.arange(0, first.shape[1], layout=gl.SliceLayout(0, first.type.layout))
    live = gl.load(block_routes + column) < R
    byte = gl.where(finite, scale, 255).to(gl.uint8)
    gl.store(scales + (first_row + column).to(gl.int64) * (I // BLOCK) + n, byte, mask=live)


# STEPS as in kernel_sm90_fp8.py.
@cached
@gluon.jit(do_not_specialize=["R", "STEPS"])
def gate_up_sm90_block_fp8_kernel(
    x, x_scale, w13, w13_scale, bias, y, y_scale,
    sorted_routes, block_expert, block_row, num_padded, counter, R, I, STEPS, activation,
    BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """y[packed row] = activate(w13[expert] @ x[packed row] + bias[expert]), quantised; arguments as of run_tiles.

    bias: FP32 [L, 2I], gate before up; None for none.
    y: E4M3 codes, uint8 [R, I], I a multiple of 128; y_scale: E8M0 bytes [R, I / 128].
    """
    let_next_kernel_start()
    run_tiles(
        w13, w13_scale, x, x_scale, sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, 2 * I,
        store_activated_rows, ACTIVATION, (bias, y, y_scale, I, activation), True, BLOCK_M, BLOCKS, GROUP_M, STAGES,
    )  # fmt: skip
