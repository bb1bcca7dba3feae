"""A grouped GEMM of FP8 rows times block FP8 weights for Hopper: scales for 128 columns of a row, for 128x128 weights.

Producer, consumers and ring as in sm90_persistent.py; weights are taken as checkpoints have them. The tensor cores sum
up 128 k from zero, and FP32 registers add that up, times both scales: of a block of weights that is one number, of the
rows as many as a thread has rows. So many rows stand on the M side of wgmma, 64 for each consumer, where a thread has
two. Few rows stand on the N side, which they fill in steps of 8, and one consumer has all of the tile's weights.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from epfuse.stages.sm90_gemm import tile_of, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import PANEL, claim, make_barriers, make_queue, read_tile, say_tile

BLOCK = gl.constexpr(128)  # rows and columns of weights that share a scale; columns of rows that do


@gluon.jit
def weight_block(n, i: gl.constexpr, n_tiles, GATED: gl.constexpr, BLOCKS: gl.constexpr):
    """Which 128 rows of an expert's matrix are the i-th ones of column tile n. Gated: gate rows, then their up rows."""
    block = n * BLOCKS + i
    if GATED:
        block = n + i * n_tiles
    return block


@gluon.jit
def numbers_of(scales):
    """E8M0 bytes -> FP32. The byte of NaN, which stands beside codes that are NaN, becomes infinity."""
    return gl.maximum(scales.to(gl.int32) << 23, 0x400000).to(gl.float32, bitcast=True)  # byte 0 is 2^-127, a subnormal


@gluon.jit
def many_rows(
    row_scales, w_scales, ring, done, steps, block_routes, R, consumer: gl.constexpr,
    BLOCKS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """FP32 [128, 64] for each block of weights, as a tuple: its rows times 64 rows, those on the M side."""
    rows, weights, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    row = gl.arange(0, PANEL, layout=gl.SliceLayout(1, layout))
    row_scales += gl.where(gl.load(block_routes + row) < R, row, 0) * steps
    first_scales, second_scales = w_scales
    part = gl.zeros([PANEL, BLOCK], gl.float32, layout=layout)
    first = part
    second = part
    for step in range(0, steps):
        stage = done % STAGES
        scale = numbers_of(gl.load(row_scales + step))
        first_scale = gl.load(first_scales + step)
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        a = rows.index(stage * CONSUMERS + consumer)
        part = warpgroup_mma(a, weights.index(stage * BLOCKS).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        if BLOCKS == 2:
            second_scale = gl.load(second_scales + step)
            first += part * (scale * first_scale)[:, None]
            first, part = warpgroup_mma_wait(0, deps=[first, part])
            b = weights.index(stage * BLOCKS + 1)
            part = warpgroup_mma(a, b.permute((1, 0)), part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage))
        done += 1
        if BLOCKS == 2:
            second += part * (scale * second_scale)[:, None]
        else:
            first += part * (scale * first_scale)[:, None]
    return (first.permute((1, 0)), second.permute((1, 0)))


@gluon.jit
def few_rows(
    row_scales, w_scales, ring, done, steps, block_routes, R,
    BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """FP32 [64, BLOCK_M] for each half of each block of weights, as a tuple: its rows, on the M side, times rows."""
    rows, weights, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    row_scales += gl.where(gl.load(block_routes + row) < R, row, 0) * steps
    first_scales, second_scales = w_scales
    zeros = gl.zeros([PANEL, BLOCK_M], gl.float32, layout=layout)
    part0 = zeros
    part1 = zeros
    part2 = zeros
    part3 = zeros
    sum0 = zeros
    sum1 = zeros
    sum2 = zeros
    sum3 = zeros
    for step in range(0, steps):
        stage = done % STAGES
        scale = numbers_of(gl.load(row_scales + step))
        first_scale = gl.load(first_scales + step)
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        b = rows.index(stage).permute((1, 0))
        a = weights.index(stage * BLOCKS)
        part0 = warpgroup_mma(a.slice(0, PANEL, dim=0), b, part0, use_acc=False, is_async=True)
        part1 = warpgroup_mma(a.slice(PANEL, PANEL, dim=0), b, part1, use_acc=False, is_async=True)
        if BLOCKS == 2:
            second_scale = gl.load(second_scales + step)
            a2 = weights.index(stage * BLOCKS + 1)
            part2 = warpgroup_mma(a2.slice(0, PANEL, dim=0), b, part2, use_acc=False, is_async=True)
            part3 = warpgroup_mma(a2.slice(PANEL, PANEL, dim=0), b, part3, use_acc=False, is_async=True)
            part0, part1, part2, part3 = warpgroup_mma_wait(0, deps=[part0, part1, part2, part3])
        else:
            part0, part1 = warpgroup_mma_wait(0, deps=[part0, part1])
        mbarrier.arrive(empty.index(stage))
        done += 1
        first_scale = (scale * first_scale)[None, :]
        sum0 += part0 * first_scale
        sum1 += part1 * first_scale
        if BLOCKS == 2:
            second_scale = (scale * second_scale)[None, :]
            sum2 += part2 * second_scale
            sum3 += part3 * second_scale
    return (sum0, sum1, sum2, sum3)


@gluon.jit
def pass_by(full, empty, done, steps, STAGES: gl.constexpr):
    """Leave the stages of a tile alone."""
    for _ in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        mbarrier.arrive(empty.index(stage))
        done += 1


@gluon.jit
def consume(
    args, scales, store_args, consumer: gl.constexpr, store: gl.constexpr, ACTIVATION: gl.constexpr,
    GATED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's rows of every tile that the producer claims."""
    (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, steps, N, R,
        tiles, tile_full, tile_empty, rows, weights, full, empty,
    ) = args  # fmt: skip
    w_scale, row_scale = scales
    ring = (rows, weights, full, empty)
    total = m_blocks * n_tiles
    done = 0
    count = 0
    wait_for_previous_kernel()
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        m, n = tile_of(tile, m_blocks, n_tiles, GROUP_M)
        expert = gl.load(block_expert + m)
        block_routes = sorted_routes + m * BLOCK_M + consumer * PANEL
        first_row = gl.load(block_row + m) + consumer * PANEL
        n_blocks = (N + BLOCK - 1) // BLOCK
        first = gl.minimum(weight_block(n, 0, n_tiles, GATED, BLOCKS), n_blocks - 1)
        second = gl.minimum(weight_block(n, BLOCKS - 1, n_tiles, GATED, BLOCKS), n_blocks - 1)
        w_scales = (
            w_scale + (expert * n_blocks + first).to(gl.int64) * steps,
            w_scale + (expert * n_blocks + second).to(gl.int64) * steps,
        )
        row_scales = row_scale + first_row.to(gl.int64) * steps
        if BLOCK_M < PANEL:
            sums = few_rows(row_scales, w_scales, ring, done, steps, block_routes, R, BLOCK_M, BLOCKS, STAGES)
            store(sums, block_routes, first_row, expert, n, R, store_args, ACTIVATION, 2 * BLOCKS)
        elif gl.load(block_routes) < R:
            sums = many_rows(
                row_scales, w_scales, ring, done, steps, block_routes, R, consumer, BLOCKS, CONSUMERS, STAGES
            )  # fmt: skip
            store(sums, block_routes, first_row, expert, n, R, store_args, ACTIVATION, BLOCKS)
        else:
            pass_by(full, empty, done, steps, STAGES)
        done += steps
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


@gluon.jit
def fetch_rows(x, rows, full, stage, row, both, step, ROWS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Start the copies of one stage of rows: of the first consumer's, and of the second's if there are any."""
    k = step * BLOCK
    if CONSUMERS == 1:
        mbarrier.expect(full.index(stage), ROWS * BLOCK)
    elif both:
        mbarrier.expect(full.index(stage), 2 * ROWS * BLOCK)
        tma.async_copy_global_to_shared(x, [row + ROWS, k], full.index(stage), rows.index(stage * CONSUMERS + 1))
    else:
        mbarrier.expect(full.index(stage), ROWS * BLOCK)
    tma.async_copy_global_to_shared(x, [row, k], full.index(stage), rows.index(stage * CONSUMERS))


@gluon.jit
def produce(
    args, w, x, counter, GATED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, GROUP_M: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Claim tiles, say which, and copy every stage of them; the first rows when the kernel before has finished."""
    (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, steps, N, R,
        tiles, tile_full, tile_empty, rows, weights, full, empty,
    ) = args  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
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
            # padding comes last in a block: the second consumer may have no rows
            both = gl.load(sorted_routes + m * BLOCK_M + (CONSUMERS - 1) * ROWS) < R
            first_line = gl.load(block_expert + m) * N
            for step in range(0, steps):
                stage = done % STAGES
                mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
                mbarrier.expect(full.index(stage), BLOCKS * BLOCK * BLOCK)
                for i in gl.static_range(BLOCKS):
                    line = first_line + weight_block(n, i, n_tiles, GATED, BLOCKS) * BLOCK
                    place = weights.index(stage * BLOCKS + i)
                    tma.async_copy_global_to_shared(w, [line, step * BLOCK], full.index(stage), place)
                if waited == 0:
                    wait_for_previous_kernel()
                    waited = 1
                fetch_rows(x, rows, full, stage, row, both, step, ROWS, CONSUMERS)
                done += 1
            tile = claim(counter)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def run_tiles(
    w, w_scale, x, row_scale, sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, N,
    store: gl.constexpr, ACTIVATION: gl.constexpr, store_args, GATED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every tile of the GEMM, shared out among the programs.

    The route table is read before the kernel before, which makes the rows, has finished: it starts this one after it
    has waited for the table.

    Args:
        w: descriptor of the values as ``[L * N, K]``, boxes of 128x128.
        w_scale: float32 ``[L, ceil(N / 128), STEPS]``.
        x: descriptor of the packed rows ``[R, K]``, boxes of 128 columns and a consumer's rows.
        row_scale: E8M0 bytes of the packed rows, ``[R, STEPS]``.
        counter: int32 zero: tiles claimed.
        STEPS: ceil(K / 128).
        N: rows of an expert's matrix; a multiple of 256 if GATED.
        store: function of (sums of the tile's weight rows in order, each ``[rows, columns]``, pointer to the columns'
            routes, packed row of the first one, the expert, the column tile, R, store_args, ACTIVATION, how many sums).
        ACTIVATION: the kind of what store applies; None for nothing.
        GATED: whether a column tile is 128 gate rows and their up rows, rather than adjacent rows.
        BLOCK_M: routes of a tile: 16 or 32, 64 or, with two consumers, 128.
        BLOCKS: times 128 are the weight rows of a tile: 1 or 2; 2 if GATED.
    """
    CONSUMERS: gl.constexpr = 2 if BLOCK_M > PANEL else 1
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_tiles = (N + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    rows = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * CONSUMERS, BLOCK_M // CONSUMERS, BLOCK], layout)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * BLOCKS, BLOCK, BLOCK], layout)
    full, empty = make_barriers(CONSUMERS, STAGES)
    tiles, tile_full, tile_empty = make_queue(CONSUMERS)
    args = (
        sorted_routes, block_expert, block_row, m_blocks, n_tiles, STEPS, N, R,
        tiles, tile_full, tile_empty, rows, weights, full, empty,
    )  # fmt: skip
    scales = (w_scale, row_scale)
    # the numbers of registers are those of the partitions but the first, which gets the rest
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (args, scales, store_args, 0, store, ACTIVATION, GATED, BLOCK_M, BLOCKS, GROUP_M, 2, STAGES)),
                (consume, (args, scales, store_args, 1, store, ACTIVATION, GATED, BLOCK_M, BLOCKS, GROUP_M, 2, STAGES)),
                (produce, (args, w, x, counter, GATED, BLOCK_M, BLOCKS, GROUP_M, 2, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (args, scales, store_args, 0, store, ACTIVATION, GATED, BLOCK_M, BLOCKS, GROUP_M, 1, STAGES)),
                (produce, (args, w, x, counter, GATED, BLOCK_M, BLOCKS, GROUP_M, 1, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip
