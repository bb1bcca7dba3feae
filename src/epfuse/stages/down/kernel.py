"""Grouped GEMM2: back to the model dimension, times the router weight in the epilogue."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.grouped_gemm import grouped_dot, tile_of


@cached
@triton.jit(do_not_specialize=["R"])
def down_kernel(
    y, w2, w2_scale, bias, topk_weights, out, sorted_routes, block_expert, num_padded,
    R, H, I,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """out[r, h] = topk_weights[r] * (y[r] . w2[e, h]) for the routes r of one block, rounded once.

    w2_scale is None for dense weights, else the E8M0 bytes [L, H, I/32] of MXFP8 ones. bias is None, or FP32 [L, H],
    added before the weight multiplies.
    """
    pid = tl.program_id(0)
    m_blocks = tl.load(num_padded) // BLOCK_M
    n_blocks = tl.cdiv(H, BLOCK_N)
    if pid >= m_blocks * n_blocks:
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = tl.load(block_expert + m).to(tl.int64)
    routes = tl.load(sorted_routes + m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = routes < R
    # padding rows read the block's first route and are never stored: rows of remote routes hold no data
    first = tl.load(sorted_routes + m * BLOCK_M)
    routes = tl.where(live, routes, first)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = expert * H + tl.minimum(columns, H - 1)
    scales = w2_scale
    if w2_scale is not None:
        scales = w2_scale + rows * (I // 32)
    acc = grouped_dot(y + routes.to(tl.int64) * I, w2 + rows * I, scales, I, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    if bias is not None:
        acc += tl.load(bias + rows)[None, :]
    acc *= tl.load(topk_weights + routes)[:, None]
    where = routes.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=live[:, None] & (columns < H)[None, :])
