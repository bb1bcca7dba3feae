"""Both GEMMs with dense weights in one launch for Hopper; the twin of kernel_sm90.py, whose weights are MXFP8."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from epfuse.kernel_cache import cached
from epfuse.stages.down.kernel_sm90 import store_weighted_panel
from epfuse.stages.gate_up.kernel_sm90 import store_activated_panel
from epfuse.stages.gate_up_down.kernel_sm90_counters import say_done, wait_until
from epfuse.stages.sm90_dense_gemm import (
    fetch_down,
    fetch_gate_up,
    head_columns,
    last_step,
    make_panels,
    multiply,
    rest_columns,
    step_of,
)
from epfuse.stages.sm90_gemm import let_next_kernel_start, tile_of, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import (
    PANEL,
    claim,
    fetch_rows,
    make_barriers,
    make_queue,
    make_row_rings,
    read_tile,
    rest_of,
    say_tile,
)

WARPS = gl.constexpr(4)  # of a consumer


@gluon.jit
def produce_both(
    args, up_args, down_args,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Claim tiles, say which, and copy every stage; of a tile's first one the weights before the rows are there."""
    (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    ) = args  # fmt: skip
    x_head, x_few, x_rest, w13, H_STEPS, RUNS = up_args
    y_head, y_few, y_rest, w2, I_STEPS, H = down_args
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    done = 0
    count = 0
    waited = 0
    tile = claim(arrivals)
    while count >= 0:
        say_tile(tiles, tile_full, tile_empty, count, tile)
        if tile >= total:
            count = -1
        else:
            count += 1
            down = tile >= ups
            m, n = tile_of(tile, m_blocks, n_up, GROUP_M)
            if down:
                m, n = tile_of(tile - ups, m_blocks, n_down, GROUP_M)
            expert = gl.load(block_expert + m)
            row = gl.load(block_row + m)
            rest = rest_of(sorted_routes + m * BLOCK_M, R, BLOCK_M, HEAD)
            panel = n * PANELS
            if down:
                for step in range(0, I_STEPS):
                    stage = done % STAGES
                    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                    fetch_down(w2, panels, full, stage, expert, panel, step, H, PANELS)
                    if step == 0:
                        if waited == 0:
                            wait_for_previous_kernel()
                            waited = 1
                        wait_until(arrivals + 1 + m, n_up * CONSUMERS * WARPS)
                    fetch_rows(
                        y_head, y_few, y_rest, heads, rests, full, stage, row, rest, step, BLOCK_M, HEAD, BLOCK_K
                    )  # fmt: skip
                    done += 1
            else:
                for step in range(0, H_STEPS):
                    stage = done % STAGES
                    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                    fetch_gate_up(w13, panels, full, stage, expert, panel, step, RUNS, PANELS)
                    if waited == 0:
                        wait_for_previous_kernel()
                        waited = 1
                    fetch_rows(
                        x_head, x_few, x_rest, heads, rests, full, stage, row, rest, step, BLOCK_M, HEAD, BLOCK_K
                    )  # fmt: skip
                    done += 1
            tile = claim(arrivals)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def store_panel(acc, place, panel, first, stores, ACTIVATION: gl.constexpr):
    """Store sums of one of the tile's panels, of a block's columns from ``first`` on, as gate_up or as down does."""
    block_routes, first_row, expert, first_panel, R = place
    up, up_store, down_store = stores
    block_routes += first
    first_row += first
    if up:
        store_activated_panel(acc, block_routes, first_row, expert, first_panel + panel, R, up_store, ACTIVATION)
    else:
        store_weighted_panel(acc, block_routes, first_row, expert, first_panel + panel, R, down_store, None)


@gluon.jit
def store_sums(
    acc, second, place, first, stores, consumer, ACTIVATION: gl.constexpr, PANELS: gl.constexpr, CONSUMERS: gl.constexpr
):
    """Store what `multiply` made of a block's columns from ``first`` on."""
    if PANELS == CONSUMERS:
        store_panel(acc, place, consumer, first, stores, ACTIVATION)
    elif PANELS % CONSUMERS == 0:
        store_panel(acc, place, consumer * 2, first, stores, ACTIVATION)
        store_panel(second, place, consumer * 2 + 1, first, stores, ACTIVATION)
    else:
        store_panel(acc, place, consumer * 2, first, stores, ACTIVATION)
        store_panel(second, place, 1, first + consumer * second.shape[1], stores, ACTIVATION)


@gluon.jit
def sums_of_step(
    ring, place, stores, consumer, ACTIVATION: gl.constexpr,
    I: gl.constexpr, BLOCK_M: gl.constexpr, HEAD: gl.constexpr,
    PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply with the I-th of dense_steps; the rest's sums are stored, the head's returned."""
    COLUMNS: gl.constexpr = head_columns(BLOCK_M, HEAD, I)
    MORE: gl.constexpr = rest_columns(BLOCK_M, HEAD, I)
    heads, rests, panels, full, empty, done, steps = ring
    acc, more, second, second_more, done = multiply(
        heads, rests, panels, full, empty, done, steps, consumer, COLUMNS, MORE, PANELS, CONSUMERS, STAGES
    )  # fmt: skip
    if MORE > 0:
        store_sums(more, second_more, place, COLUMNS, stores, consumer, ACTIVATION, PANELS, CONSUMERS)
    return acc, second, done


@gluon.jit
def sums_of_head(
    step, ring, place, stores, consumer, ACTIVATION: gl.constexpr,
    I: gl.constexpr, BLOCK_M: gl.constexpr, HEAD: gl.constexpr,
    PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """sums_of_step for the step-th, which is the I-th or a later one: all of them have the whole head.

    So there is one copy of the code that stores the head's sums.
    """
    if last_step(BLOCK_M, HEAD) == I or step == I:
        acc, second, done = sums_of_step(
            ring, place, stores, consumer, ACTIVATION, I, BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES
        )  # fmt: skip
    else:
        acc, second, done = sums_of_head(
            step, ring, place, stores, consumer, ACTIVATION, I + 1, BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES
        )  # fmt: skip
    return acc, second, done


@gluon.jit
def consume_tile(
    step, ring, place, stores, consumer, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply and store one consumer's part of a tile, for as many columns as the step-th of dense_steps has."""
    if head_columns(BLOCK_M, HEAD, 0) < HEAD:
        if step == 0:
            few, few_second, done = sums_of_step(
                ring, place, stores, consumer, ACTIVATION, 0, BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES
            )  # fmt: skip
            store_sums(few, few_second, place, 0, stores, consumer, ACTIVATION, PANELS, CONSUMERS)
        else:
            acc, second, done = sums_of_head(
                step, ring, place, stores, consumer, ACTIVATION, 1, BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES
            )  # fmt: skip
            store_sums(acc, second, place, 0, stores, consumer, ACTIVATION, PANELS, CONSUMERS)
    else:
        acc, second, done = sums_of_head(
            step, ring, place, stores, consumer, ACTIVATION, 0, BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES
        )  # fmt: skip
        store_sums(acc, second, place, 0, stores, consumer, ACTIVATION, PANELS, CONSUMERS)
    return done


@gluon.jit
def consume_both(
    args, up_args, down_args, consumer: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, GROUP_M: gl.constexpr,
    PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's part of every tile that the producer claims."""
    (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    ) = args  # fmt: skip
    H_STEPS, up_store = up_args
    I_STEPS, down_store = down_args
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    which = gl.to_tensor(consumer)  # no constant: what it calls is traced once for all consumers
    done = 0
    count = 0
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        up = tile < ups
        m, n = tile_of(gl.where(up, tile, tile - ups), m_blocks, gl.where(up, n_up, n_down), GROUP_M)
        block_routes = sorted_routes + m * BLOCK_M
        place = (block_routes, gl.load(block_row + m), gl.load(block_expert + m), n * PANELS, R)
        ring = (heads, rests, panels, full, empty, done, gl.where(up, H_STEPS, I_STEPS))
        done = consume_tile(
            step_of(block_routes, R, BLOCK_M, HEAD), ring, place, (up, up_store, down_store), which, ACTIVATION,
            BLOCK_M, HEAD, PANELS, CONSUMERS, STAGES,
        )  # fmt: skip
        if up:
            say_done(arrivals + 1 + m)
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


@cached
@gluon.jit(do_not_specialize=["R", "UP_TILES", "DOWN_TILES", "RUNS", "H_STEPS", "I_STEPS"])
def gate_up_down_sm90_dense_kernel(
    x_head, x_few, x_rest, w13_panels, up_bias, y,
    y_head, y_few, y_rest, w2_panels, down_bias, topk_weights, out,
    lone_token, final, sorted_routes, block_expert, block_row, num_padded, arrivals,
    R, H, I, RUNS, H_STEPS, I_STEPS, UP_TILES, DOWN_TILES, activation,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """gate_up_down_sm90_kernel for dense weights: w13 and w2 as checkpoints have them, rows and results packed.

    The route table is read before the kernel before, which gathers the rows, has finished: it starts this one after it
    has waited for the table. Without tiles of one GEMM only the other runs.

    out may be the memory of x: the rows of a block are read for the last time before they are written. What a copy
    finds past a tile's last row may be written meanwhile; it is multiplied for columns that are not stored.

    Args:
        x_head, x_few, x_rest: tensor descriptors of BF16 x [R, H], packed: a block's head, a few rows of its rest and
            all of it; None where no block needs them.
        w13_panels: tensor descriptor of BF16 w13 [L, 2I, H], as fetch_gate_up takes it.
        up_bias: FP32 [L, 2I], gate before up; None for none.
        y: BF16 [R, I], written: the packed rows between the GEMMs.
        y_head, y_few, y_rest: descriptors of y, as those of x.
        w2_panels: tensor descriptor of BF16 w2 [L, H, I], as fetch_down takes it.
        down_bias: FP32 [L, H]; None for none.
        topk_weights: FP32 [T, K], by route.
        out: BF16 [R, H], written: the packed results, but for the rows of lone tokens.
        lone_token: int32 [R], for each packed row the token whose only one it is, or -1; None where nobody asks.
        final: BF16 [T, H]: the rows of lone tokens are written here; None with lone_token.
        sorted_routes: int32, routes by expert, R where padding; see RouteTable, as the next four.
        block_expert: int32, the local expert of each block of BLOCK_M routes.
        block_row: int32, the packed row of each block's first route.
        num_padded: int32 [1], slots of sorted_routes in use.
        arrivals: int32 zeros: tiles claimed, then for each block how many warps have stored y.
        R: routes, T * K.
        H: columns of x and of out.
        I: columns of y.
        RUNS: runs of 8 rows of an expert's w13: 2I / 8.
        H_STEPS, I_STEPS: steps of 64 columns of w13 and of w2, the last of which may be cut short.
        UP_TILES, DOWN_TILES: tiles of an expert's w13 and w2; 0 to leave gate_up or down out.
        activation: FP32 parameters of ACTIVATION, a tuple.
        BLOCK_N: weight rows of a tile: one or two panels of 64 for each consumer, or three for two.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    PANELS: gl.constexpr = BLOCK_N // PANEL
    heads, rests = make_row_rings(BLOCK_M, HEAD, BLOCK_K, STAGES, gl.bfloat16)
    panels = make_panels(PANELS, STAGES)
    full, empty = make_barriers(CONSUMERS, STAGES)
    tiles, tile_full, tile_empty = make_queue(CONSUMERS)
    args = (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, UP_TILES, DOWN_TILES,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    )  # fmt: skip
    up_args = (H_STEPS, (up_bias, y, I, activation))
    down_args = (I_STEPS, (down_bias, topk_weights, out, H, lone_token, final))
    up_copies = (x_head, x_few, x_rest, w13_panels, H_STEPS, RUNS)
    down_copies = (y_head, y_few, y_rest, w2_panels, I_STEPS, H)
    # the numbers of registers are those of the partitions but the first, which gets the rest
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume_both, (args, up_args, down_args, 0, ACTIVATION, BLOCK_M, HEAD, GROUP_M, PANELS, 2, STAGES)),
                (consume_both, (args, up_args, down_args, 1, ACTIVATION, BLOCK_M, HEAD, GROUP_M, PANELS, 2, STAGES)),
                (produce_both, (args, up_copies, down_copies, BLOCK_M, HEAD, BLOCK_K, GROUP_M, PANELS, 2, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume_both, (args, up_args, down_args, 0, ACTIVATION, BLOCK_M, HEAD, GROUP_M, PANELS, 3, STAGES)),
                (consume_both, (args, up_args, down_args, 1, ACTIVATION, BLOCK_M, HEAD, GROUP_M, PANELS, 3, STAGES)),
                (consume_both, (args, up_args, down_args, 2, ACTIVATION, BLOCK_M, HEAD, GROUP_M, PANELS, 3, STAGES)),
                (produce_both, (args, up_copies, down_copies, BLOCK_M, HEAD, BLOCK_K, GROUP_M, PANELS, 3, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
