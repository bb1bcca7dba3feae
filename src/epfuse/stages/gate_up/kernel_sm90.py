"""Grouped GEMM1 for Hopper; the twin of kernel.py's gate_up_kernel, for BF16 rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.activation import activate
from epfuse.stages.sm90_gemm import (
    BLOCK,
    block_pointers,
    fetch_into_l2,
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
def source_rows(expert, first_output, row, I):
    """Rows of w13 [L, 2I, ..] that rows of a tile stand for: 8 gate rows and their 8 up rows in turn.

    Past the last output its rows come again, for results that are not stored.
    """
    output = gl.minimum(first_output + row // 16 * 8 + row % 8, I - 1)
    return expert.to(gl.int64) * 2 * I + output + (row // 8 % 2) * I


@gluon.jit
def guess_weights(
    w13, OWN_ORDER: gl.constexpr, H, I, H_PADDED, PANELS, LOCAL, FIRST_WAVE,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, GUESS: gl.constexpr,
):  # fmt: skip
    """While the route table is being made, bring into L2 what will be needed if every expert has one row block.

    GUESS bytes at the beginning of each weight row (in OWN_ORDER), or as much of each panel, for the first wave of
    programs, of which a small layer has tiles for some only.
    """
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    if gl.program_id(0) < gl.minimum(FIRST_WAVE, LOCAL * n_blocks):
        expert, n = tile_of(gl.program_id(0), LOCAL, n_blocks, GROUP_M)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        row = gl.arange(0, BLOCK_N, layout=layout)
        if OWN_ORDER:
            fetch_into_l2(w13 + source_rows(expert, n * (BLOCK_N // 2), row, I) * H, GUESS)
        else:
            panel = expert * PANELS + gl.minimum(n * (BLOCK_N // 64) + row // 64, PANELS - 1)
            fetch_into_l2(w13 + panel.to(gl.int64) * H_PADDED * 64 + (row % 64) * GUESS, GUESS)


@gluon.jit
def store_activated(
    acc, bias, out, block_routes, first_row, expert, first_output, R, I, activation, ACTIVATION: gl.constexpr
):
    """Activate accumulators [rows, columns], 8 gate rows and their 8 up rows in turn, and store [columns, rows / 2].

    bias is added first: FP32 [L, 2I], gate before up, or None.

    A column's row of out is its route, or with first_row the columns take rows from there on, and those are kept in L2.
    """
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    EVICT: gl.constexpr = "" if first_row is None else "evict_last"
    if bias is not None:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + source_rows(expert, first_output, row, I))[:, None]
    # the rounding point of the unfused path: accumulators are stored in the activations' dtype
    rounded = acc.to(gl.bfloat16).to(gl.float32)
    gate, up = rounded.reshape([ROWS // 16, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()
    y = activate(gate, up, activation, ACTIVATION, ONE_DIVISION=True).to(gl.bfloat16).reshape([ROWS // 2, COLUMNS])
    layout: gl.constexpr = row_store_layout(ROWS // 2, gl.num_warps())
    result = gl.convert_layout(y, layout)
    outputs = first_output + gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, layout))
    routes = gl.load(block_routes + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)))
    rows = routes
    if first_row is not None:
        rows = first_row + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    where = rows.to(gl.int64)[None, :] * I + outputs[:, None]
    stored = (routes < R)[None, :] & (outputs < I)[:, None]
    gl.store(out + where, result, mask=stored, eviction_policy=EVICT)


@gluon.jit
def store_activated_panel(acc, block_routes, first_row, expert, panel, R, args, ACTIVATION: gl.constexpr):
    """store_activated for accumulators of one panel of weight rows."""
    bias, y, I, activation = args
    first_output = panel * (acc.shape[0] // 2)
    store_activated(acc, bias, y, block_routes, first_row, expert, first_output, R, I, activation, ACTIVATION)


@gluon.jit
def gate_up_tile(
    x, w13, w13_scale, bias, out, block_routes, partials, arrivals, tile, split, shares, expert, n,
    R, H, I, H_PADDED, PANELS, activation,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr, TAIL_SPLIT: gl.constexpr, EVEN_K: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_N weight rows of one expert, for the BLOCK_M routes at block_routes."""
    PAIRS: gl.constexpr = in_pairs(w13_scale)
    copy_layout: gl.constexpr = row_copy_layout(BLOCK_K, gl.num_warps(), PAIRS)
    routes = gl.load(block_routes + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy_layout)))
    first, steps = share_of(H_PADDED // BLOCK_K, split, shares)
    if w13_scale is None:
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copy_layout))
        source = source_rows(expert, n * (BLOCK_N // 2), row, I)
        w_ptrs = row_pointers(w13 + first * BLOCK_K, source * H, BLOCK_K)
        s_ptrs = w13_scale
    elif in_blocks(w13):
        source = source_rows(expert, n * (BLOCK_N // 2), rows_of_blocks(BLOCK_N), I)
        w_ptrs = block_pointers(w13 + first * BLOCK_K, source * H)
        row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, sum_layout(BLOCK_M, gl.num_warps())))
        block = source_rows(expert, n * (BLOCK_N // 2), row, I) // BLOCK
        s_ptrs = w13_scale + block * (H_PADDED // BLOCK_K) + first
    else:
        panel, last_panel = expert * PANELS + n * (BLOCK_N // 64), expert * PANELS + PANELS - 1
        w_ptrs = fragment_pointers(
            w13 + first * (64 * BLOCK_K), panel, last_panel, H_PADDED, BLOCK_N, BLOCK_K, 2, PAIRS
        )
        if PAIRS:
            s_ptrs = row_scale_pointers(w13_scale, panel, last_panel, BLOCK_N, BLOCK_M)
        else:
            s_ptrs = fragment_scale_pointers(
                w13_scale + first * (BLOCK_K // 2), panel, last_panel, H_PADDED, BLOCK_N, BLOCK_K // 2
            )
    x_ptrs = row_pointers(x + first * BLOCK_K, (routes // K).to(gl.int64) * H, BLOCK_K, PAIRS)
    acc = weights_times_rows(
        w_ptrs, s_ptrs, x_ptrs, routes < R, H - first * BLOCK_K, steps,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EVEN_K, WAIT=False,
    )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        acc, last = sum_of_shares(acc, partials, arrivals, tile, split, SPLIT_K)
    if TAIL_SPLIT > 1:
        last = split == 0
        if shares > 1:
            acc, last = sum_of_shares(acc, partials, arrivals, tile, split, TAIL_SPLIT)
    if last:
        first_output = n * (BLOCK_N // 2)
        store_activated(acc, bias, out, block_routes, None, expert, first_output, R, I, activation, ACTIVATION)


@cached
@gluon.jit(do_not_specialize=["R", "FIRST_WAVE", "arrivals", "PLACES"])
def gate_up_sm90_kernel(
    x, w13, w13_scale, bias, out, sorted_routes, block_expert, num_padded, partials, arrivals,
    R, H, I, H_PADDED, PANELS, LOCAL, FIRST_WAVE, activation, PLACES,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SPLIT_K: gl.constexpr, TAIL_SPLIT: gl.constexpr, EVEN_K: gl.constexpr,
    GUESS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """out[r, i] = activate(x[r // K] . gate row i, x[r // K] . up row i) for the routes r of one block.

    The biases, where there are any, are added to the products.

    Every 16 rows of a weight tile are 8 gate rows and their 8 up rows: the two that belong together are in one thread.
    SPLIT_K programs share a tile where there are too few tiles to fill the GPU, or TAIL_SPLIT each of the last ones.

    Args:
        x: BF16 [T, H].
        w13: dense BF16 [L, 2I, H], or codes, uint8: in fragment order [L, PANELS, H_PADDED / 32, 2048], or with one
            scale a row [L, PANELS, H_PADDED / 128, 64, 128]; or block FP8, E4M3 [L, 2I, H].
        w13_scale: int32 [L, PANELS, H_PADDED / 128, 64] of fragments, FP32 [L, PANELS * 64] of rows, FP32
            [L, 2I / 128, H_PADDED / 128] of blocks; None if dense.
        bias: FP32 [L, 2I], gate before up; None for none.
        out: BF16 [R, I]; row r is written if route r is local.
        sorted_routes: int32, routes by expert, R where padding; see RouteTable, as the next two.
        block_expert: int32, the local expert of each block of BLOCK_M routes.
        num_padded: int32 [1], slots of sorted_routes in use.
        partials: FP32 [shared tiles, programs that share one, BLOCK_N, BLOCK_M], undefined before; None if none do.
        arrivals: int32 [shared tiles], zeros before; None if none are.
        R: routes, T * K.
        H: columns of x and of weights in their own order, dense or in blocks.
        I: columns of out.
        H_PADDED: columns of the weights in whole steps.
        PANELS: panels of 64 weight rows of one expert.
        LOCAL: L, local experts.
        FIRST_WAVE: programs that guess_weights lets guess.
        activation: FP32 parameters of ACTIVATION, a tuple.
        PLACES: programs of a wave, for TAIL_SPLIT: so many share each tile after the last full one.
    """
    if GUESS > 0:
        own_order: gl.constexpr = w13_scale is None or in_blocks(w13)
        guess_weights(w13, own_order, H, I, H_PADDED, PANELS, LOCAL, FIRST_WAVE, BLOCK_N, GROUP_M, GUESS)
    wait_for_previous_kernel()
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    tile = gl.program_id(0) // SPLIT_K
    split = gl.program_id(0) % SPLIT_K
    shares, slot = SPLIT_K, tile
    if TAIL_SPLIT > 1:
        tile, split, shares, slot = tail_tile_of(gl.program_id(0), m_blocks * n_blocks, PLACES, TAIL_SPLIT)
    if tile >= m_blocks * n_blocks:
        return
    m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
    expert = gl.load(block_expert + m)
    block_routes = sorted_routes + m * BLOCK_M
    # padding comes last in a block: if its second half begins with padding, half the columns are enough; not where
    # programs share a tile, because the shares of all tiles lie one after another and must have one size
    if BLOCK_M >= 64 and SPLIT_K == 1 and TAIL_SPLIT == 1:
        if gl.load(block_routes + BLOCK_M // 2) >= R:
            gate_up_tile(
                x, w13, w13_scale, bias, out, block_routes, partials, arrivals, slot, split, shares, expert, n,
                R, H, I, H_PADDED, PANELS, activation,
                K, BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, SPLIT_K, TAIL_SPLIT, EVEN_K, ACTIVATION,
            )  # fmt: skip
            return
    gate_up_tile(
        x, w13, w13_scale, bias, out, block_routes, partials, arrivals, slot, split, shares, expert, n,
        R, H, I, H_PADDED, PANELS, activation,
        K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, SPLIT_K, TAIL_SPLIT, EVEN_K, ACTIVATION,
    )  # fmt: skip
