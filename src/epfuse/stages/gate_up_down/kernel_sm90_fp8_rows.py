"""Both GEMMs of FP8 rows for Hopper where experts have hundreds of them: routed rows on the M side of wgmma.

Tiles are claimed as in kernel_sm90.py. One is 128 routed rows, 64 for each of two consumers, by 256 weight rows: so
large a tile moves the fewest bytes through L2 and shared memory for a product, and where there are many rows the card
multiplies at its power limit. A thread has two routed rows, and little to load at a tile's end.

The tensor cores sum up 256 k from zero, half a tile's weight rows at a time; registers add up the rest in FP32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from epfuse.kernel_cache import cached
from epfuse.stages.activation import activate
from epfuse.stages.down.kernel_sm90 import store_weighted_panel
from epfuse.stages.gate_up.kernel_sm90 import store_activated_panel
from epfuse.stages.gate_up.kernel_sm90_block_fp8 import store_codes
from epfuse.stages.gate_up_down.kernel_sm90_counters import say_done, wait_until
from epfuse.stages.sm90_block_fp8_gemm import numbers_of, pass_by
from epfuse.stages.sm90_gemm import let_next_kernel_start, tile_of, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import PANEL, claim, make_barriers, make_queue, read_tile, say_tile

WARPS = gl.constexpr(4)  # of a consumer
BLOCK_K = gl.constexpr(128)
BLOCK_M = gl.constexpr(128)
PANELS_OF_TILE = gl.constexpr(4)
HALF = gl.constexpr(128)  # weight rows that are multiplied at a time


@gluon.jit
def copy_tile(w, x, panel, row, both, steps, ready, target, ring, done, waited, STAGES: gl.constexpr):
    """Copy every stage of one tile; of the first one the weights before the rows are there, which may take time.

    Rows are there when the kernel before has finished, and the counter at ready has reached target; only those of
    consumers that have any are copied.
    """
    rows, weights, full, empty = ring
    for step in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
        mbarrier.expect(full.index(stage), PANELS_OF_TILE * PANEL * BLOCK_K)
        for i in gl.static_range(PANELS_OF_TILE):
            line = ((panel + i) * steps + step) * PANEL
            place = weights.index(stage).slice(i * PANEL, PANEL, dim=0)
            tma.async_copy_global_to_shared(w, [line, 0], full.index(stage), place)
        if step == 0:
            if waited == 0:
                wait_for_previous_kernel()
                waited = 1
            wait_until(ready, target)
        k = step * BLOCK_K
        if both:
            mbarrier.expect(full.index(stage), 2 * PANEL * BLOCK_K)
            tma.async_copy_global_to_shared(x, [row + PANEL, k], full.index(stage), rows.index(stage * 2 + 1))
        else:
            mbarrier.expect(full.index(stage), PANEL * BLOCK_K)
        tma.async_copy_global_to_shared(x, [row, k], full.index(stage), rows.index(stage * 2))
        done += 1
    return done, waited


@gluon.jit
def produce_both(args, up_copies, down_copies, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """Claim tiles, all of gate_up's before the first of down's, say which, and copy every stage of them."""
    table, arrivals, m_blocks, n_up, n_down, queue, ring, R = args
    sorted_routes, block_expert, block_row = table
    tiles, tile_full, tile_empty = queue
    w13, x, up_steps, UP_PANELS = up_copies
    w2, y, down_steps, DOWN_PANELS = down_copies
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
            both = gl.load(sorted_routes + m * BLOCK_M + PANEL) < R  # padding comes last in a block
            if down:
                done, waited = copy_tile(
                    w2, y, expert * DOWN_PANELS + n * PANELS_OF_TILE, row, both, down_steps,
                    arrivals + 1 + m, n_up * 2 * WARPS, ring, done, waited, STAGES,
                )  # fmt: skip
            else:
                done, waited = copy_tile(
                    w13, x, expert * UP_PANELS + n * PANELS_OF_TILE, row, both, up_steps,
                    arrivals, 0, ring, done, waited, STAGES,
                )  # fmt: skip
            tile = claim(arrivals)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def multiply_rows(ring, done, steps, consumer: gl.constexpr, STAGES: gl.constexpr):
    """FP32 [128, 64] twice: both halves of a tile's weight rows times this consumer's rows; steps is even."""
    rows, weights, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    part = gl.zeros([PANEL, HALF], gl.float32, layout=layout)
    first = part
    second = part
    for _ in range(0, steps // 2):
        stage = done % STAGES
        next_stage = (done + 1) % STAGES
        a = rows.index(stage * 2 + consumer)
        b = weights.index(stage)
        next_a = rows.index(next_stage * 2 + consumer)
        next_b = weights.index(next_stage)
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        part = warpgroup_mma(a, b.slice(0, HALF, dim=0).permute((1, 0)), part, use_acc=False, is_async=True)
        mbarrier.wait(full.index(next_stage), ((done + 1) // STAGES) & 1)
        part = warpgroup_mma(next_a, next_b.slice(0, HALF, dim=0).permute((1, 0)), part, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        first += part
        first, part = warpgroup_mma_wait(0, deps=[first, part])  # what was read of part comes before what is written
        part = warpgroup_mma(a, b.slice(HALF, HALF, dim=0).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma(next_a, next_b.slice(HALF, HALF, dim=0).permute((1, 0)), part, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage))
        mbarrier.arrive(empty.index(next_stage))
        done += 2
        second += part
    return first.permute((1, 0)), second.permute((1, 0)), done


@gluon.jit
def store_quantised_panel(acc, block_routes, first_row, expert, panel, R, args, ACTIVATION: gl.constexpr):
    """Activate accumulators of one panel of weight rows, and store E4M3 in the scales that their rows have already."""
    codes, scales, I, activation = args
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    # as store_activated: 8 gate rows and their 8 up rows in turn, rounded as if they were stored
    rounded = acc.to(gl.bfloat16).to(gl.float32)
    gate, up = rounded.reshape([ROWS // 16, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()
    y = activate(gate, up, activation, ACTIVATION, ONE_DIVISION=True).reshape([ROWS // 2, COLUMNS])
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, y.type.layout))
    live = gl.load(block_routes + column) < R
    scale = gl.load(scales + first_row + column, mask=live, other=127).to(gl.int32)
    store_codes(y, scale, scale < 255, block_routes, first_row, panel * (ROWS // 2), codes, I, R)


@gluon.jit
def store_down(acc, weight_row, block_routes, first_row, expert, half, R, args):
    """store_weighted_panel, which would load the bias a number at a time; weight_row: of the accumulators' rows."""
    bias, topk_weights, out, H, lone_token, final = args
    if bias is not None:
        acc += gl.load(bias + expert.to(gl.int64) * H + weight_row, mask=weight_row < H, other=0.0)[:, None]
    weighted = (None, topk_weights, out, H, lone_token, final)
    store_weighted_panel(acc, block_routes, first_row, expert, half, R, weighted, None)


@gluon.jit
def store_half(
    acc, w_scale, row_scale, weights_of_expert, half, block_routes, first_row, expert, R, store_args,
    ACTIVATION: gl.constexpr, GEMMS: gl.constexpr,
):  # fmt: skip
    """Scale sums [128 weight rows, 64 columns], the half-th of the expert, and store them as gate_up or as down does.

    What is past the expert's last weight row is not stored.
    """
    up, up_store, down_store = store_args
    weight_row = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, acc.type.layout))
    acc *= gl.load(w_scale + weight_row, mask=weight_row < weights_of_expert, other=0.0)[:, None]
    column = gl.arange(0, PANEL, layout=gl.SliceLayout(0, acc.type.layout))
    live = gl.load(block_routes + column) < R
    acc *= numbers_of(gl.load(row_scale + first_row + column, mask=live, other=0))[None, :]
    if GEMMS == "gate_up":
        store_activated_panel(acc, block_routes, first_row, expert, half, R, up_store, ACTIVATION)
    elif GEMMS == "down":
        store_down(acc, weight_row, block_routes, first_row, expert, half, R, down_store)
    elif up:
        store_quantised_panel(acc, block_routes, first_row, expert, half, R, up_store, ACTIVATION)
    else:
        store_down(acc, weight_row, block_routes, first_row, expert, half, R, down_store)


@gluon.jit
def consume_both(
    args, up_args, down_args, consumer: gl.constexpr, ACTIVATION: gl.constexpr, GEMMS: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's rows of every tile, if it has any."""
    table, arrivals, m_blocks, n_up, n_down, queue, ring, R = args
    sorted_routes, block_expert, block_row = table
    tiles, tile_full, tile_empty = queue
    w13_scale, x_scale, up_steps, UP_PANELS, up_store = up_args
    w2_scale, y_scale, down_steps, DOWN_PANELS, down_store = down_args
    _, _, full, empty = ring
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    done = 0
    count = 0
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        up = tile < ups
        m, n = tile_of(gl.where(up, tile, tile - ups), m_blocks, gl.where(up, n_up, n_down), GROUP_M)
        weights_of_expert = gl.where(up, UP_PANELS, DOWN_PANELS) * PANEL
        steps = gl.where(up, up_steps, down_steps)
        expert = gl.load(block_expert + m)
        block_routes = sorted_routes + m * BLOCK_M + consumer * PANEL
        first_row = gl.load(block_row + m) + consumer * PANEL
        if gl.load(block_routes) < R:
            first, second, done = multiply_rows(ring, done, steps, consumer, STAGES)
            w_scale = gl.where(up, w13_scale, w2_scale) + expert * weights_of_expert
            row_scale = gl.where(up, x_scale, y_scale)
            for i in gl.static_range(2):
                store_half(
                    first if i == 0 else second, w_scale, row_scale, weights_of_expert, 2 * n + i, block_routes,
                    first_row, expert, R, (up, up_store, down_store), ACTIVATION, GEMMS,
                )  # fmt: skip
        else:
            pass_by(full, empty, done, steps, STAGES)
            done += steps
        if GEMMS == "both":
            if up:
                say_done(arrivals + 1 + m)
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


# STEPS as in kernel_sm90_fp8.py of gate_up; arrivals begins a counter later where down runs alone
@cached
@gluon.jit(do_not_specialize=["arrivals", "R", "UP_STEPS", "DOWN_STEPS", "UP_PANELS", "DOWN_PANELS"])
def gate_up_down_sm90_fp8_rows_kernel(
    x, x_scale, w13, w13_scale, up_bias, y, y_rows, y_scale, w2, w2_scale, down_bias,
    topk_weights, out, lone_token, final,
    sorted_routes, block_expert, block_row, num_padded, arrivals, R, H, I, UP_STEPS, DOWN_STEPS, UP_PANELS, DOWN_PANELS,
    activation,
    GEMMS: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """y[packed row] = activate(w13[expert] @ x[packed row]) in y_scale; out[packed row] as down_sm90_fp8_kernel.

    The route table is read before the kernel before, which quantises the rows, has finished: it starts this one after
    it has waited for the table. Without panels of one GEMM only the other runs.

    out may be the memory of x if a row of x begins where the same row of out does: the rows of a block are read for the
    last time before they are written. What a copy finds past a tile's last row may be written meanwhile; it is
    multiplied for columns that are not stored.

    Args:
        x: descriptor of E4M3 x [R, H], packed, boxes of 128 columns and 64 rows.
        x_scale: E8M0 byte of each row of x.
        w13, w2: descriptors of the codes as ``[L * panels * STEPS * 64, 128]``.
        w13_scale, w2_scale: float32, a scale for each row of every panel.
        up_bias: FP32 [L, 2I], gate before up, where gate_up runs alone; None for none.
        y: E4M3 codes, uint8 [R, I], packed; written, then read through y_rows, a descriptor as x. BF16 where gate_up
            runs alone.
        y_scale: E8M0 byte of each row of y, there before: nothing of the row exceeds it.
        down_bias: FP32 [L, H]; None for none.
        topk_weights: FP32 [T, K], by route.
        out: BF16 [R, H], packed.
        lone_token, final: as store_weighted takes them.
        sorted_routes, block_expert, block_row, num_padded: int32, see RouteTable.
        arrivals: int32 zeros: tiles claimed, then for each row block the warps that are through with gate_up's panels.
        R: routes, T * K.
        H: columns of out.
        I: columns of y.
        UP_STEPS, DOWN_STEPS: steps of BLOCK_K of w13 and of w2.
        UP_PANELS, DOWN_PANELS: panels of 64 rows of one expert's w13 and w2; 0 to leave that GEMM out.
        activation: FP32 parameters of ACTIVATION, a tuple.
        GEMMS: "both", or "gate_up" or "down" for a kernel of one alone, whose launch has no panels of the other.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_up = (UP_PANELS + PANELS_OF_TILE - 1) // PANELS_OF_TILE
    n_down = (DOWN_PANELS + PANELS_OF_TILE - 1) // PANELS_OF_TILE
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    rows = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, PANEL, BLOCK_K], layout)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PANELS_OF_TILE * PANEL, BLOCK_K], layout)
    full, empty = make_barriers(2, STAGES)
    queue = make_queue(2)
    ring = (rows, weights, full, empty)
    table = (sorted_routes, block_expert, block_row)
    args = (table, arrivals, m_blocks, n_up, n_down, queue, ring, R)
    up_store = (up_bias, y, I, activation)
    if GEMMS == "both":
        up_store = (y, y_scale, I, activation)
    up_args = (w13_scale, x_scale, UP_STEPS, UP_PANELS, up_store)
    down_args = (w2_scale, y_scale, DOWN_STEPS, DOWN_PANELS, (down_bias, topk_weights, out, H, lone_token, final))
    up_copies = (w13, x, UP_STEPS, UP_PANELS)
    down_copies = (w2, y_rows, DOWN_STEPS, DOWN_PANELS)
    # the numbers of registers are those of the partitions but the first, which gets the rest
    gl.warp_specialize(
        [
            (consume_both, (args, up_args, down_args, 0, ACTIVATION, GEMMS, GROUP_M, STAGES)),
            (consume_both, (args, up_args, down_args, 1, ACTIVATION, GEMMS, GROUP_M, STAGES)),
            (produce_both, (args, up_copies, down_copies, GROUP_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
