"""Grouped GEMM1: gather routed rows, multiply with gate and up weights, the activation in the epilogue."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.activation import activate
from epfuse.stages.grouped_gemm import grouped_dot, tile_of


@cached
@triton.jit(do_not_specialize=["R"])
def gate_up_kernel(
    x, w13, w13_scale, bias, out, sorted_routes, block_expert, num_padded,
    R, H, I, activation,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """out[r, i] = activate(x[r // K] . w13[e, i], x[r // K] . w13[e, I + i]) for the routes r of one block.

    w13_scale is None for dense weights, else the E8M0 bytes [L, 2I, H/32] of MXFP8 ones. bias is None, or FP32 [L, 2I].

    Gate and up rows alternate in the weight tile: one dot makes both accumulators, and the two that belong together lie
    in neighbouring columns, which one thread holds. With INPUTS 1 there is no gate: w13 is [L, I, H], bias [L, I].
    """
    COLUMNS: tl.constexpr = BLOCK_N // INPUTS
    pid = tl.program_id(0)
    m_blocks = tl.load(num_padded) // BLOCK_M
    n_blocks = tl.cdiv(I, COLUMNS)
    if pid >= m_blocks * n_blocks:
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = tl.load(block_expert + m).to(tl.int64)
    routes = tl.load(sorted_routes + m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = routes < R
    # padding rows read token 0 and are never stored; columns past I read the last row and are never stored
    tokens = tl.where(live, routes // K, 0).to(tl.int64)
    pair = tl.arange(0, BLOCK_N)
    rows = expert * INPUTS * I + tl.minimum(n * COLUMNS + pair // INPUTS, I - 1) + (pair % INPUTS) * I
    scales = w13_scale
    if w13_scale is not None:
        scales = w13_scale + rows * (H // 32)
    acc = grouped_dot(x + tokens * H, w13 + rows * H, scales, H, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    if bias is not None:
        acc += tl.load(bias + rows)[None, :]
    # the rounding point of the unfused path: accumulators are stored in the activations' dtype
    acc = acc.to(out.dtype.element_ty).to(tl.float32)
    if INPUTS == 2:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, COLUMNS, 2)))
        y = activate(gate, up, activation, ACTIVATION).to(out.dtype.element_ty)
    else:
        y = activate(acc, None, activation, ACTIVATION).to(out.dtype.element_ty)
    columns = n * COLUMNS + tl.arange(0, COLUMNS)
    where = routes.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(out + where, y, mask=live[:, None] & (columns < I)[None, :])
