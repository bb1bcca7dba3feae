"""Both GEMMs in one launch for Hopper: a program goes on from gate_up's tiles to down's, without a gap between kernels.

Tiles are claimed from a counter, all of gate_up's before the first of down's, so a program that waits for rows waits
for programs that are running: none depends on how many of them the GPU holds at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from epfuse.stages.down.kernel_sm90_persistent import store_panel as store_down
from epfuse.stages.gate_up.kernel_sm90_persistent import store_panel as store_gate_up
from epfuse.stages.sm90_gemm import (
    fragment_scale_pointers,
    let_next_kernel_start,
    tile_of,
    wait_for_previous_kernel,
)
from epfuse.stages.sm90_persistent import (
    CONSUMERS,
    PANEL,
    claim,
    consume_tile,
    fetch_rows,
    fetch_weights,
    few_columns,
    make_barriers,
    make_rings,
    say_done,
    wait_until,
    wide_part,
)

TILE_SLOTS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a consumer


@gluon.jit
def read_tile(tiles, tile_full, tile_empty, count):
    """The count-th tile that the producer claimed."""
    slot = count % TILE_SLOTS
    mbarrier.wait(tile_full.index(slot), (count // TILE_SLOTS) & 1)
    tile = gl.max(tiles.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(tile_empty.index(slot))
    return tile


@gluon.jit
def produce_both(
    x_wide, x_narrow, w13, y_wide, y_narrow, w2, sorted_routes, block_expert, block_row, arrivals,
    m_blocks, n_up, n_down, tiles, tile_full, tile_empty, wide, narrow, panels, full, empty,
    R, H_PADDED, I_PADDED, UP_PANELS, DOWN_PANELS,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Claim tiles, say which, and copy every stage of them."""
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0
    count = 0
    tile = claim(arrivals)
    waited = 0
    while count >= 0:
        slot = count % TILE_SLOTS
        mbarrier.wait(tile_empty.index(slot), (count // TILE_SLOTS + 1) & 1)
        tiles.index(slot).store(gl.full([1], tile, gl.int32, layout))
        mbarrier.arrive(tile_full.index(slot))
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
            has_narrow = False
            if WIDE < BLOCK_M:
                has_narrow = gl.load(sorted_routes + m * BLOCK_M + WIDE) < R
            if down:
                for step in range(0, I_PADDED // BLOCK_K):
                    stage = done % STAGES
                    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                    fetch_weights(
                        w2, panels, full, stage, expert * DOWN_PANELS + n * CONSUMERS, step, I_PADDED, BLOCK_K
                    )
                    if step == 0:
                        wait_until(arrivals + 1 + m, n_up * CONSUMERS * WARPS)
                    fetch_rows(y_wide, y_narrow, wide, narrow, full, stage, row, has_narrow, step, BLOCK_M, BLOCK_K)
                    done += 1
            else:
                for step in range(0, H_PADDED // BLOCK_K):
                    stage = done % STAGES
                    mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                    fetch_weights(w13, panels, full, stage, expert * UP_PANELS + n * CONSUMERS, step, H_PADDED, BLOCK_K)
                    if waited == 0:
                        wait_for_previous_kernel()
                        waited = 1
                    fetch_rows(x_wide, x_narrow, wide, narrow, full, stage, row, has_narrow, step, BLOCK_M, BLOCK_K)
                    done += 1
            tile = claim(arrivals)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def one_tile(
    w_scale, K_PADDED, PANELS, m, n, sorted_routes, block_expert, block_row, wide, narrow, panels, full, empty, done, R,
    consumer: gl.constexpr, store: gl.constexpr, store_args,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """This consumer's panel of one tile."""
    FEW: gl.constexpr = few_columns(BLOCK_M)
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    expert = gl.load(block_expert + m)
    panel = n * CONSUMERS + consumer
    s_ptrs = fragment_scale_pointers(
        w_scale, expert * PANELS + panel, expert * PANELS + PANELS - 1, K_PADDED, PANEL, BLOCK_K // PARTS
    )  # fmt: skip
    block_routes = sorted_routes + m * BLOCK_M
    first_row = gl.load(block_row + m)
    steps = K_PADDED // BLOCK_K
    if gl.load(block_routes + FEW) >= R:
        done = consume_tile(
            s_ptrs, block_routes, first_row, panel, wide, narrow, panels, full, empty, done, steps, R,
            consumer, store, store_args, FEW, 0, BLOCK_K, STAGES, PARTS,
        )  # fmt: skip
    else:
        done = consume_tile(
            s_ptrs, block_routes, first_row, panel, wide, narrow, panels, full, empty, done, steps, R,
            consumer, store, store_args, WIDE, BLOCK_M - WIDE, BLOCK_K, STAGES, PARTS,
        )  # fmt: skip
    return done


@gluon.jit
def consume_both(
    args, up_args, down_args, consumer: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's panel of every tile that the producer claims."""
    (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, wide, narrow, panels, full, empty, R,
    ) = args  # fmt: skip
    w13_scale, H_PADDED, UP_PANELS, up_store = up_args
    w2_scale, I_PADDED, DOWN_PANELS, down_store = down_args
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    done = 0
    count = 0
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        if tile < ups:
            m, n = tile_of(tile, m_blocks, n_up, GROUP_M)
            done = one_tile(
                w13_scale, H_PADDED, UP_PANELS, m, n, sorted_routes, block_expert, block_row,
                wide, narrow, panels, full, empty, done, R,
                consumer, store_gate_up, up_store, BLOCK_M, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
            say_done(arrivals + 1 + m)
        else:
            m, n = tile_of(tile - ups, m_blocks, n_down, GROUP_M)
            done = one_tile(
                w2_scale, I_PADDED, DOWN_PANELS, m, n, sorted_routes, block_expert, block_row,
                wide, narrow, panels, full, empty, done, R,
                consumer, store_down, down_store, BLOCK_M, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


@gluon.jit(do_not_specialize=["R"])
def gate_up_down_sm90_kernel(
    x_wide, x_narrow, w13_lines, w13_scale, y, y_wide, y_narrow, w2_lines, w2_scale, topk_weights, out,
    sorted_routes, block_expert, block_row, num_padded, arrivals,
    R, H, I, H_PADDED, I_PADDED, UP_PANELS, DOWN_PANELS, alpha, beta, limit,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """gate_up_sm90_persistent_kernel, then down_sm90_persistent_kernel.

    out may be the memory of x: the rows of a block are read for the last time before they are written. What a copy
    finds past a tile's last row may be written meanwhile; it is multiplied for columns that are not stored.

    Args:
        arrivals: int32 zeros: tiles claimed, then for each row block the warps that are through with gate_up's panels.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_up = (UP_PANELS + CONSUMERS - 1) // CONSUMERS
    n_down = (DOWN_PANELS + CONSUMERS - 1) // CONSUMERS
    wide, narrow, panels = make_rings(BLOCK_M, BLOCK_K, STAGES)
    full, empty = make_barriers(STAGES)
    tiles = gl.allocate_shared_memory(gl.int32, [TILE_SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [TILE_SLOTS, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILE_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(TILE_SLOTS):
        mbarrier.init(tile_full.index(slot), count=1)
        mbarrier.init(tile_empty.index(slot), count=CONSUMERS)
    args = (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, wide, narrow, panels, full, empty, R,
    )  # fmt: skip
    up_args = (w13_scale, H_PADDED, UP_PANELS, (y, I, alpha, beta, limit))
    down_args = (w2_scale, I_PADDED, DOWN_PANELS, (topk_weights, out, H))
    gl.warp_specialize(
        [
            (consume_both, (args, up_args, down_args, 0, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume_both, (args, up_args, down_args, 1, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume_both, (args, up_args, down_args, 2, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (produce_both, (x_wide, x_narrow, w13_lines, y_wide, y_narrow, w2_lines, sorted_routes, block_expert,
                            block_row, arrivals, m_blocks, n_up, n_down, tiles, tile_full, tile_empty,
                            wide, narrow, panels, full, empty, R, H_PADDED, I_PADDED, UP_PANELS, DOWN_PANELS,
                            BLOCK_M, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip
