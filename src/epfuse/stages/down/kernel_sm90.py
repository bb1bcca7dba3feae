"""Grouped GEMM2 for Hopper; the twin of kernel.py's down_kernel, for BF16 rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.sm90_gemm import (
    BLOCK,
    block_pointers,
    fragment_pointers,
    fragment_scale_pointers,
    in_blocks,
    in_pairs,
    let_next_kernel_start,
    row_pointers,
    row_scale_pointers,
    rows_of_blocks,
    share_of,
    sum_of_shares,
    tail_tile_of,
    tile_of,
    wait_for_previous_kernel,
    weights_times_rows,
)
from epfuse.stages.sm90_layouts import row_copy_layout, row_store_layout, sum_layout


@gluon.jit
def store_weighted(
    acc, bias, topk_weights, out, block_routes, first_row, expert, first_column, R, H, lone_token=None, final=None
):
    """Multiply accumulators [rows, columns] with the router weights of their columns and store [columns, rows].

    bias is added first: FP32 [L, H], or None.

    A column's row of out is its route, or with first_row the columns take rows from there on, and those are kept in L2.
    Those that lone_token has a token for go to that row of final instead.
    """
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    EVICT: gl.constexpr = "" if first_row is None else "evict_last"
    if bias is not None:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + expert.to(gl.int64) * H + gl.minimum(first_column + row, H - 1))[:, None]
    weighted = gl.load(block_routes + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout)))
    acc *= gl.load(topk_weights + weighted, mask=weighted < R, other=0.0)[None, :]
    layout: gl.constexpr = row_store_layout(ROWS, gl.num_warps())
    result = gl.convert_layout(acc.to(gl.bfloat16), layout)
    columns = first_column + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    routes = gl.load(block_routes + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)))
    rows = routes
    if first_row is not None:
        rows = first_row + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    starts = out + rows.to(gl.int64) * H
    if lone_token is not None:
        token = gl.load(lone_token + rows, mask=routes < R, other=-1)
        starts = gl.where(token >= 0, final + token.to(gl.int64) * H, starts)
    stored = (routes < R)[None, :] & (columns < H)[:, None]
    gl.store(starts[None, :] + columns[:, None], result, mask=stored, eviction_policy=EVICT)


@gluon.jit
def store_weighted_panel(acc, block_routes, first_row, expert, panel, R, args, ACTIVATION: gl.constexpr):
    """store_weighted for accumulators of one panel of weight rows; ACTIVATION is None."""
    bias, topk_weights, out, H, lone_token, final = args
    first_column = panel * acc.shape[0]
    store_weighted(
        acc, bias, topk_weights, out, block_routes, first_row, expert, first_column, R, H, lone_token, final
    )  # fmt: skip


@gluon.jit
def down_tile(
    y, w2, w2_scale, bias, topk_weights, out, block_routes, partials, arrivals, tile, split, shares, expert, n,
    R, H, I, I_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, SPLIT_K: gl.constexpr, TAIL_SPLIT: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_N weight rows of one expert, for the BLOCK_M routes at block_routes."""
    PAIRS: gl.constexpr = in_pairs(w2_scale)
    copy_layout: gl.constexpr = row_copy_layout(BLOCK_K, gl.num_warps(), PAIRS)
    routes = gl.load(block_routes + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy_layout)))
    first, steps = share_of(I_PADDED // BLOCK_K, split, shares)
    if w2_scale is None:
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copy_layout))
        source = expert.to(gl.int64) * H + gl.minimum(n * BLOCK_N + row, H - 1)
        w_ptrs = row_pointers(w2 + first * BLOCK_K, source * I, BLOCK_K)
        s_ptrs = w2_scale
    elif in_blocks(w2):
        row = gl.minimum(n * BLOCK_N + rows_of_blocks(BLOCK_N), H - 1)
        w_ptrs = block_pointers(w2 + first * BLOCK_K, (expert.to(gl.int64) * H + row) * I)
        scaled = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, sum_layout(BLOCK_M, gl.num_warps())))
        block = expert * ((H + BLOCK - 1) // BLOCK) + gl.minimum(n * BLOCK_N + scaled, H - 1) // BLOCK
        s_ptrs = w2_scale + block.to(gl.int64) * (I_PADDED // BLOCK_K) + first
    else:
        panel, last_panel = expert * PANELS + n * (BLOCK_N // 64), expert * PANELS + PANELS - 1
        w_ptrs = fragment_pointers(w2 + first * (64 * BLOCK_K), panel, last_panel, I_PADDED, BLOCK_N, BLOCK_K, 2, PAIRS)
        if PAIRS:
            s_ptrs = row_scale_pointers(w2_scale, panel, last_panel, BLOCK_N, BLOCK_M)
        else:
            s_ptrs = fragment_scale_pointers(
                w2_scale + first * (BLOCK_K // 2), panel, last_panel, I_PADDED, BLOCK_N, BLOCK_K // 2
            )
    y_ptrs = row_pointers(y + first * BLOCK_K, routes.to(gl.int64) * I, BLOCK_K, PAIRS)
    acc = weights_times_rows(
        w_ptrs, s_ptrs, y_ptrs, routes < R, I - first * BLOCK_K, steps,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, WAIT=True,
    )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        acc, last = sum_of_shares(acc, partials, arrivals, tile, split, SPLIT_K)
    if TAIL_SPLIT > 1:
        last = split == 0
        if shares > 1:
            acc, last = sum_of_shares(acc, partials, arrivals, tile, split, TAIL_SPLIT)
    if last:
        store_weighted(acc, bias, topk_weights, out, block_routes, None, expert, n * BLOCK_N, R, H)


# arrivals begins in the middle of the counters, at another place with every number of tokens
@cached
@gluon.jit(do_not_specialize=["R", "arrivals", "PLACES"])
def down_sm90_kernel(
    y, w2, w2_scale, bias, topk_weights, out, sorted_routes, block_expert, num_padded, partials, arrivals,
    R, H, I, I_PADDED, PANELS, PLACES,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SPLIT_K: gl.constexpr, TAIL_SPLIT: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """out[r, h] = topk_weights[r] * (y[r] . w2[e, h] + bias[e, h]) for the routes r of one block, rounded once.

    The route table is older than the kernel before this one, which had to wait for it: only y is waited for, and the
    first weights are on their way by then.

    Args:
        y: BF16 [R, I]; only rows of local routes are read.
        w2: dense BF16 [L, H, I], or codes, uint8: in fragment order [L, PANELS, I_PADDED / 32, 2048], or with one
            scale a row [L, PANELS, I_PADDED / 128, 64, 128]; or block FP8, E4M3 [L, H, I].
        w2_scale: int32 [L, PANELS, I_PADDED / 128, 64] of fragments, FP32 [L, PANELS * 64] of rows, FP32
            [L, ceil(H / 128), I_PADDED / 128] of blocks; None if dense.
        bias: FP32 [L, H]; None for none.
        topk_weights: FP32 [T, K], by route.
        out: BF16 [R, H]; row r is written if route r is local.
        sorted_routes: int32, routes by expert, R where padding; see RouteTable, as the next two.
        block_expert: int32, the local expert of each block of BLOCK_M routes.
        num_padded: int32 [1], slots of sorted_routes in use.
        partials: FP32 [shared tiles, programs that share one, BLOCK_N, BLOCK_M], undefined before; None if none do.
        arrivals: int32 [shared tiles], zeros before; None if none are.
        R: routes, T * K.
        H: columns of out.
        I: columns of y and of weights in their own order, dense or in blocks.
        I_PADDED: columns of the weights in whole steps.
        PANELS: panels of 64 weight rows of one expert.
        PLACES: programs of a wave, for TAIL_SPLIT: so many share each tile after the last full one.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    tile = gl.program_id(0) // SPLIT_K
    split = gl.program_id(0) % SPLIT_K
    shares, slot = SPLIT_K, tile
    if TAIL_SPLIT > 1:
        tile, split, shares, slot = tail_tile_of(gl.program_id(0), m_blocks * n_blocks, PLACES, TAIL_SPLIT)
    if tile >= m_blocks * n_blocks:
        if tile == 0:  # nothing to do: still don't finish before the kernel before
            wait_for_previous_kernel()
        return
    m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
    expert = gl.load(block_expert + m)
    block_routes = sorted_routes + m * BLOCK_M
    # padding comes last in a block: if its second half begins with padding, half the columns are enough; not where
    # programs share a tile, because the shares of all tiles lie one after another and must have one size
    if BLOCK_M >= 64 and SPLIT_K == 1 and TAIL_SPLIT == 1:
        if gl.load(block_routes + BLOCK_M // 2) >= R:
            down_tile(
                y, w2, w2_scale, bias, topk_weights, out,
                block_routes, partials, arrivals, slot, split, shares, expert, n, R, H, I, I_PADDED, PANELS,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, SPLIT_K, TAIL_SPLIT, EVEN_K,
            )  # fmt: skip
            return
    down_tile(
        y, w2, w2_scale, bias, topk_weights, out, block_routes, partials, arrivals, slot, split, shares, expert, n,
        R, H, I, I_PADDED, PANELS,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, SPLIT_K, TAIL_SPLIT, EVEN_K,
    )  # fmt: skip
