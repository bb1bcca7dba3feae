"""Grouped GEMM1 with FP8 rows and FP8 weights; the activation is a kernel of its own, as it also quantises."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.grouped_fp8_gemm import grouped_fp8_dot
from epfuse.stages.grouped_gemm import tile_of


@cached
@triton.jit(do_not_specialize=["R"])
def gate_up_fp8_kernel(
    x, x_scale, w13, w13_scale, out, sorted_routes, block_expert, num_padded,
    R, H, I, G,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out[r, n] = x[r // K] . w13[e, n] for the routes r of one block, n over 2I, rounded once.

    G = ceil(H / GROUP) scales a row: x_scale [T, G] and w13_scale [L, ceil(2I / SCALE_ROWS), G].
    """
    pid = tl.program_id(0)
    m_blocks = tl.load(num_padded) // BLOCK_M
    n_blocks = tl.cdiv(2 * I, BLOCK_N)
    if pid >= m_blocks * n_blocks:
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = tl.load(block_expert + m).to(tl.int64)
    routes = tl.load(sorted_routes + m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = routes < R
    # padding rows read token 0 and are never stored; columns past 2I read the last row and are never stored
    tokens = tl.where(live, routes // K, 0).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, 2 * I - 1)
    scale_rows = expert * tl.cdiv(2 * I, SCALE_ROWS) + rows // SCALE_ROWS
    acc = grouped_fp8_dot(
        x + tokens * H, x_scale + tokens * G, w13 + (expert * 2 * I + rows) * H, w13_scale + scale_rows * G, H,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, EVEN_K,
    )  # fmt: skip
    where = routes.to(tl.int64)[:, None] * (2 * I) + columns[None, :]
    tl.store(out + where, tl.trans(acc).to(out.dtype.element_ty), mask=live[:, None] & (columns < 2 * I)[None, :])
