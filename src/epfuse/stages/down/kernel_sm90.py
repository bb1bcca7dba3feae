"""Grouped GEMM2 for Hopper; the twin of kernel.py's down_kernel, for BF16 rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.stages.sm90_gemm import (
    fragment_pointers,
    let_next_kernel_start,
    row_copy_layout,
    row_pointers,
    row_store_layout,
    tile_of,
    wait_for_previous_kernel,
    weights_times_rows,
)


@gluon.jit(do_not_specialize=["R"])
def down_sm90_kernel(
    y, w2, w2_scale, topk_weights, out, sorted_routes, block_expert, num_padded,
    R, H, I, I_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """out[r, h] = topk_weights[r] * (y[r] . w2[e, h]) for the routes r of one block, rounded once.

    The route table is older than the kernel before this one, which had to wait for it: only y is waited for, and the
    first weights are on their way by then.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    pid = gl.program_id(0)
    if pid >= m_blocks * n_blocks:
        if pid == 0:  # nothing to do: still don't finish before the kernel before
            wait_for_previous_kernel()
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = gl.load(block_expert + m)
    copy_layout: gl.constexpr = row_copy_layout(BLOCK_K, gl.num_warps())
    routes = gl.load(sorted_routes + m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy_layout)))
    rows = routes.to(gl.int64)
    if w2_scale is None:
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copy_layout))
        source = expert.to(gl.int64) * H + gl.minimum(n * BLOCK_N + row, H - 1)
        w_ptrs = row_pointers(w2, source * I, BLOCK_K)
        s_ptrs = w2_scale
    else:
        w_ptrs, s_ptrs = fragment_pointers(
            w2,
            w2_scale,
            expert * PANELS + n * (BLOCK_N // 64),
            expert * PANELS + PANELS - 1,
            I_PADDED,
            BLOCK_N,
            BLOCK_K,
        )
    acc = weights_times_rows(
        w_ptrs, s_ptrs, row_pointers(y, rows * I, BLOCK_K), routes < R, I, I_PADDED,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, WAIT=True,
    )  # fmt: skip
    if topk_weights is not None:
        routes = gl.load(sorted_routes + m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, acc.type.layout)))
        acc *= gl.load(topk_weights + routes, mask=routes < R, other=0.0)[None, :]
    out_layout: gl.constexpr = row_store_layout(BLOCK_N, gl.num_warps())
    result = gl.convert_layout(acc.to(gl.bfloat16), out_layout)
    columns = n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out_layout))
    routes = gl.load(sorted_routes + m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out_layout)))
    where = routes.to(gl.int64)[None, :] * H + columns[:, None]
    gl.store(out + where, result, mask=(routes < R)[None, :] & (columns < H)[:, None])
