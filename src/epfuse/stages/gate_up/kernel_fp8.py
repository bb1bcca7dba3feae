"""Grouped GEMM1 with FP8 rows and FP8 weights; the activation is a kernel of its own, as it also quantises."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.grouped_fp8_gemm import grouped_fp8_dot
from epfuse.stages.grouped_gemm import tile_of


@cached
@triton.jit(do_not_specialize=["R"])
def gate_up_fp8_kernel(
    x, x_scale, w13, w13_scale, bias, out, sorted_routes, block_expert, num_padded,
    R, H, I, G,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, EVEN_K: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """out[r, n] = x[r // K] . w13[e, n] for the routes r of one block, n over N, rounded once.

    N is 2I, or I where INPUTS is 1: no gate. G = ceil(H / GROUP) scales a row: x_scale [T, G] and w13_scale
    [L, ceil(N / SCALE_ROWS), G]. bias is None, or FP32 [L, N].
    """
    N = INPUTS * I
    pid = tl.program_id(0)
    m_blocks = tl.load(num_padded) // BLOCK_M
    n_blocks = tl.cdiv(N, BLOCK_N)
    if pid >= m_blocks * n_blocks:
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = tl.load(block_expert + m).to(tl.int64)
    routes = tl.load(sorted_routes + m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = routes < R
    # padding rows read token 0 and are never stored; columns past N read the last row and are never stored
    tokens = tl.where(live, routes // K, 0).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, N - 1)
    scale_rows = expert * tl.cdiv(N, SCALE_ROWS) + rows // SCALE_ROWS
    acc = grouped_fp8_dot(
        x + tokens * H, x_scale + tokens * G, w13 + (expert * N + rows) * H, w13_scale + scale_rows * G, H,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, EVEN_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + expert * N + rows)[:, None]
    where = routes.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + where, tl.trans(acc).to(out.dtype.element_ty), mask=live[:, None] & (columns < N)[None, :])
