"""A grouped GEMM of FP8 rows times FP8 weights for Hopper, both with one scale a row (weights/row_fp8.py).

No operand passes through registers: the copy engine brings both to shared memory, and the tensor cores take them from
there. Their own sums of FP8 products keep 13 bits or so behind the leading one, so FP32 registers add up the sums of
each 128 k; the scales follow when a sum is complete.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from epfuse.stages.sm90_gemm import tile_of, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import (
    PANEL,
    claim,
    fetch_rows,
    head_columns,
    make_barriers,
    make_queue,
    make_row_rings,
    number_of_steps,
    read_tile,
    rest_columns,
    rest_of,
    say_tile,
    step_of,
)


@gluon.jit
def scale_sums(acc, w_scale, row_scale, first_weight_row, first_row, block_routes, R):
    """Accumulators [weight rows, columns] times the scales of both; an E8M0 byte for each column."""
    rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    live = gl.load(block_routes + columns) < R
    byte = gl.load(row_scale + first_row + columns, mask=live, other=0).to(gl.int32)
    column_scale = gl.maximum(byte << 23, 0x400000).to(gl.float32, bitcast=True)  # byte 0 is 2^-127, a subnormal
    return acc * gl.load(w_scale + first_weight_row + rows)[:, None] * column_scale[None, :]


@gluon.jit
def multiply(
    heads, rests, panels, full, empty, done, steps, consumer: gl.constexpr,
    COLUMNS: gl.constexpr, MORE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """FP32 [64, COLUMNS] and [64, MORE]: this consumer's weight rows times rows of each stage.

    The first COLUMNS of the head and the first MORE of the rest; without the second result if MORE is 0.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    acc = gl.zeros([PANEL, COLUMNS], gl.float32, layout=layout)
    more = acc
    part = acc
    more_part = acc
    if MORE > 0:
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 32])
        more = gl.zeros([PANEL, MORE], gl.float32, layout=more_layout)
        more_part = more
    for _ in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        a = panels.index(stage * CONSUMERS + consumer)
        rows = heads.index(stage).slice(0, COLUMNS, dim=0)
        part = warpgroup_mma(a, rows.permute((1, 0)), part, use_acc=False, is_async=True)
        if MORE > 0:
            more_rows = rests.index(stage).slice(0, MORE, dim=0)
            more_part = warpgroup_mma(a, more_rows.permute((1, 0)), more_part, use_acc=False, is_async=True)
            part, more_part = warpgroup_mma_wait(0, deps=[part, more_part])
        else:
            part = warpgroup_mma_wait(0, deps=[part])
        done += 1
        mbarrier.arrive(empty.index(stage))
        acc += part
        if MORE > 0:
            more += more_part
    return acc, more, done


@gluon.jit
def multiply_wide(
    heads, rests, panels, full, empty, done, steps, consumer: gl.constexpr,
    MORE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `multiply`, for 256 columns, as FP32 [64, 128] twice and [64, MORE]: registers hold one half's part."""
    HALF: gl.constexpr = 128
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    first = gl.zeros([PANEL, HALF], gl.float32, layout=layout)
    second = first
    more = first
    part = first
    more_part = first
    if MORE > 0:
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 32])
        more = gl.zeros([PANEL, MORE], gl.float32, layout=more_layout)
        more_part = more
    for _ in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        a = panels.index(stage * CONSUMERS + consumer)
        head = heads.index(stage)
        part = warpgroup_mma(a, head.slice(0, HALF, dim=0).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        first += part
        first, part = warpgroup_mma_wait(0, deps=[first, part])  # what was read of part comes before what is written
        part = warpgroup_mma(a, head.slice(HALF, HALF, dim=0).permute((1, 0)), part, use_acc=False, is_async=True)
        if MORE > 0:
            more_rows = rests.index(stage).slice(0, MORE, dim=0)
            more_part = warpgroup_mma(a, more_rows.permute((1, 0)), more_part, use_acc=False, is_async=True)
            part, more_part = warpgroup_mma_wait(0, deps=[part, more_part])
        else:
            part = warpgroup_mma_wait(0, deps=[part])
        done += 1
        mbarrier.arrive(empty.index(stage))
        second += part
        if MORE > 0:
            more += more_part
    return first, second, more, done


@gluon.jit
def store_columns(
    acc, w_scale, row_scale, first_weight_row, first, block_routes, first_row, expert, panel, R,
    store: gl.constexpr, ACTIVATION: gl.constexpr, store_args,
):  # fmt: skip
    """Scale and store the sums of a tile's columns from ``first`` on."""
    block_routes += first
    first_row += first
    acc = scale_sums(acc, w_scale, row_scale, first_weight_row, first_row, block_routes, R)
    store(acc, block_routes, first_row, expert, panel, R, store_args, ACTIVATION)


@gluon.jit
def consume_columns(
    w_scale, row_scale, block_routes, first_weight_row, first_row, expert, panel,
    heads, rests, panels, full, empty, done, steps, R,
    consumer: gl.constexpr, store: gl.constexpr, ACTIVATION: gl.constexpr, store_args,
    COLUMNS: gl.constexpr, MORE: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of one consumer, for its first COLUMNS routes, or for COLUMNS + MORE."""
    if COLUMNS > 128:
        acc, second, more, done = multiply_wide(
            heads, rests, panels, full, empty, done, steps, consumer, MORE, CONSUMERS, STAGES
        )  # fmt: skip
    else:
        acc, more, done = multiply(
            heads, rests, panels, full, empty, done, steps, consumer, COLUMNS, MORE, CONSUMERS, STAGES
        )  # fmt: skip
        second = acc
    store_columns(
        acc, w_scale, row_scale, first_weight_row, 0, block_routes, first_row, expert, panel, R,
        store, ACTIVATION, store_args,
    )  # fmt: skip
    if COLUMNS > 128:
        store_columns(
            second, w_scale, row_scale, first_weight_row, 128, block_routes, first_row, expert, panel, R,
            store, ACTIVATION, store_args,
        )  # fmt: skip
    if MORE > 0:
        store_columns(
            more, w_scale, row_scale, first_weight_row, COLUMNS, block_routes, first_row, expert, panel, R,
            store, ACTIVATION, store_args,
        )  # fmt: skip
    return done


@gluon.jit
def consume(
    args, scales, store_args, consumer: gl.constexpr, store: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, GROUP_M: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's panel of every tile that the producer claims."""
    (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, steps, PANELS, R,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty,
    ) = args  # fmt: skip
    w_scale, row_scale = scales
    STEPS: gl.constexpr = number_of_steps(BLOCK_M, HEAD)
    total = m_blocks * n_tiles
    done = 0
    count = 0
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        m, n = tile_of(tile, m_blocks, n_tiles, GROUP_M)
        panel = n * CONSUMERS + consumer
        expert = gl.load(block_expert + m)
        first_weight_row = (expert * PANELS + gl.minimum(panel, PANELS - 1)) * PANEL
        block_routes = sorted_routes + m * BLOCK_M
        first_row = gl.load(block_row + m)
        step = step_of(block_routes, R, BLOCK_M, HEAD)
        for i in gl.static_range(STEPS):
            if step == i:
                done = consume_columns(
                    w_scale, row_scale, block_routes, first_weight_row, first_row, expert, panel,
                    heads, rests, panels, full, empty, done, steps, R, consumer, store, ACTIVATION, store_args,
                    head_columns(BLOCK_M, HEAD, i), rest_columns(BLOCK_M, HEAD, i), CONSUMERS, STAGES,
                )  # fmt: skip
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


@gluon.jit
def produce(
    args, w, row_copies, counter,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Claim tiles, say which, and copy every stage of them; the first rows when the kernel before has finished."""
    (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, steps, PANELS, R,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty,
    ) = args  # fmt: skip
    rows_head, rows_few, rows_rest = row_copies
    total = m_blocks * n_tiles
    done = 0
    count = 0
    waited = 0
    tile = claim(counter)
    while count >= 0:
        say_tile(tiles, tile_full, tile_empty, count, tile)
        if tile >= total:
            count = -1
        else:
            count += 1
            m, n = tile_of(tile, m_blocks, n_tiles, GROUP_M)
            row = gl.load(block_row + m)
            rest = rest_of(sorted_routes + m * BLOCK_M, R, BLOCK_M, HEAD)
            panel = gl.load(block_expert + m) * PANELS + n * CONSUMERS
            for step in range(0, steps):
                stage = done % STAGES
                mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                mbarrier.expect(full.index(stage), CONSUMERS * PANEL * BLOCK_K)
                for i in gl.static_range(CONSUMERS):
                    line = ((panel + i) * steps + step) * PANEL
                    place = panels.index(stage * CONSUMERS + i)
                    tma.async_copy_global_to_shared(w, [line, 0], full.index(stage), place)
                if waited == 0:
                    wait_for_previous_kernel()
                    waited = 1
                fetch_rows(
                    rows_head, rows_few, rows_rest, heads, rests, full, stage, row, rest, step, BLOCK_M, HEAD, BLOCK_K
                )  # fmt: skip
                done += 1
            tile = claim(counter)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def run_tiles(
    w, w_scale, row_copies, row_scale, sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, PANELS,
    store: gl.constexpr, ACTIVATION: gl.constexpr, store_args,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every tile of the GEMM, shared out among the programs.

    The route table is read before the kernel before, which quantises the rows, has finished: it starts this one after
    it has waited for the table.

    Args:
        w: descriptor of the codes as ``[L * panels * STEPS * 64, 128]``.
        w_scale: float32, a scale for each row of every panel.
        row_copies: descriptors of the packed rows: a block's head, a few of its rest, all of it.
        row_scale: E8M0 byte of each packed row.
        counter: int32 zero: tiles claimed.
        STEPS: steps of BLOCK_K.
        store: function of (sums [64, columns], pointer to the columns' routes, packed row of the first one, the expert,
            the panel, R, store_args, ACTIVATION).
        ACTIVATION: the kind of what store applies; None for nothing.
    """
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_tiles = (PANELS + CONSUMERS - 1) // CONSUMERS
    heads, rests = make_row_rings(BLOCK_M, HEAD, BLOCK_K, STAGES, gl.float8e4nv)
    panels = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES * CONSUMERS, PANEL, BLOCK_K], gl.NVMMASharedLayout(128, 8, 2)
    )
    full, empty = make_barriers(CONSUMERS, STAGES)
    tiles, tile_full, tile_empty = make_queue(CONSUMERS)
    args = (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, STEPS, PANELS, R,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty,
    )  # fmt: skip
    scales = (w_scale, row_scale)
    # the numbers of registers are those of the partitions but the first, which gets the rest
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (args, scales, store_args, 0, store, ACTIVATION, BLOCK_M, HEAD, GROUP_M, CONSUMERS, STAGES)),
                (consume, (args, scales, store_args, 1, store, ACTIVATION, BLOCK_M, HEAD, GROUP_M, CONSUMERS, STAGES)),
                (produce, (args, w, row_copies, counter, BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (args, scales, store_args, 0, store, ACTIVATION, BLOCK_M, HEAD, GROUP_M, CONSUMERS, STAGES)),
                (consume, (args, scales, store_args, 1, store, ACTIVATION, BLOCK_M, HEAD, GROUP_M, CONSUMERS, STAGES)),
                (consume, (args, scales, store_args, 2, store, ACTIVATION, BLOCK_M, HEAD, GROUP_M, CONSUMERS, STAGES)),
                (produce, (args, w, row_copies, counter, BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
