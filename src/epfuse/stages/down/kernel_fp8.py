"""Grouped GEMM2 with FP8 rows and FP8 weights, times the router weight in the epilogue."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.grouped_fp8_gemm import grouped_fp8_dot
from epfuse.stages.grouped_gemm import tile_of


@cached
@triton.jit(do_not_specialize=["R"])
def down_fp8_kernel(
    y, y_scale, w2, w2_scale, bias, topk_weights, out, sorted_routes, block_expert, num_padded,
    R, H, I, G,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, EVEN_K: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """out[r, h] = topk_weights[r] * (y[r] . w2[e, h]) for the routes r of one block, rounded once.

    G = ceil(I / GROUP) scales a row: y_scale [R, G] and w2_scale [L, ceil(H / SCALE_ROWS), G]. With ATOMIC out is FP32
    [T, H], zero before, and gets each route's row added to that of its token, in no order. bias is None, or FP32
    [L, H], added before the weight multiplies.
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
    routes = tl.where(live, routes, tl.load(sorted_routes + m * BLOCK_M)).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, H - 1)
    scale_rows = expert * tl.cdiv(H, SCALE_ROWS) + rows // SCALE_ROWS
    acc = grouped_fp8_dot(
        y + routes * I, y_scale + routes * G, w2 + (expert * H + rows) * I, w2_scale + scale_rows * G, I,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, EVEN_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + expert * H + rows)[:, None]
    weighted = tl.trans(acc) * tl.load(topk_weights + routes)[:, None]
    mask = live[:, None] & (columns < H)[None, :]
    if ATOMIC:
        tl.atomic_add(out + (routes // K)[:, None] * H + columns[None, :], weighted, mask=mask, sem="relaxed")
    else:
        tl.store(out + routes[:, None] * H + columns[None, :], weighted.to(out.dtype.element_ty), mask=mask)
