"""Device code of both GEMMs for Hopper where there are many rows: one program per multiprocessor, warps specialised.

MXFP8 weights in fragment order only. A producer (one warp) has the tensor copy engine fill a ring in shared memory and
runs ahead, into the next tile too. Three consumers (a warpgroup each) multiply: each has one panel of the tile's weight
rows and all of its routed rows, and none waits for another, so that one dequantises while the wgmma of the others runs.

The copy engine copies adjacent rows: the routed rows lie packed in the route table's order. What a tile copies past its
last row are rows of the next expert, for columns that are not stored.

The routed rows of a tile are one power of two, the wide part, or that and a smaller one, the narrow part: 144 are
128 + 16. Tiles are often of 1.1 times a power of two, because the rows of an expert scatter about their mean.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from epfuse.stages.sm90_gemm import (
    fragment_scale_pointers,
    group_layout,
    powers,
    register_operand,
    tile_of,
    wait_for_previous_kernel,
)

PANEL = gl.constexpr(64)  # weight rows of a consumer
CONSUMERS = gl.constexpr(3)


@gluon.constexpr_function
def wide_part(block_m):
    """The largest power of two in BLOCK_M."""
    return 1 << (block_m.bit_length() - 1)


@gluon.constexpr_function
def few_columns(block_m):
    """The smaller number of columns that a tile of BLOCK_M rows is multiplied with: no narrow part, or half."""
    wide = wide_part(block_m)
    return wide if wide < block_m else wide // 2


@gluon.constexpr_function
def swizzled_fragments(block_k):
    """Shared memory offset -> (row, k) of a panel of one stage, behind the copy engine's 128-byte swizzle.

    As fragment_shared; the swizzle adds address bits 7 to 9 to bits 4 to 6, so what a bit of the first three stands
    for also holds what the second three do.
    """
    bases = [[0, 1], [8, 0], [0, 8], [0, 16]]  # the 16 bytes of a thread
    bases += [[0, 2], [0, 4], [1, 0], [2, 2], [4, 4], [17, 0], [32, 0]]  # the 128 threads
    bases += [[0, k] for k in powers(32, block_k)]
    return gl.SharedLinearLayout(bases)


@gluon.jit
def make_rings(BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of the wide and the narrow part of the rows, and of the weights' panels.

    Without a narrow part its place is taken by the wide one, which nothing reads there.
    """
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    NARROW: gl.constexpr = BLOCK_M - WIDE
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    wide = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WIDE, BLOCK_K], layout)
    narrow = wide
    if NARROW > 0:
        narrow = gl.allocate_shared_memory(gl.bfloat16, [STAGES, NARROW, BLOCK_K], layout)
    panels = gl.allocate_shared_memory(
        gl.uint8, [STAGES * CONSUMERS, PANEL * BLOCK_K // 128, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    return wide, narrow, panels


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """Per stage: weights and rows have arrived; all consumers are through with it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def fetch_weights(w, panels, full, stage, panel, step, K_PADDED, BLOCK_K: gl.constexpr):
    """Start the copies of one stage of weights, a panel each."""
    LINES: gl.constexpr = PANEL * BLOCK_K // 128  # lines of 128 bytes that a panel has in a stage
    mbarrier.expect(full.index(stage), CONSUMERS * PANEL * BLOCK_K)
    for i in gl.static_range(CONSUMERS):
        line = (panel + i) * (K_PADDED // 2) + step * LINES
        tma.async_copy_global_to_shared(w, [line, 0], full.index(stage), panels.index(stage * CONSUMERS + i))


@gluon.jit
def fetch_rows(
    x_wide, x_narrow, wide, narrow, full, stage, row, has_narrow, step, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr
):
    """Start the copies of one stage of rows; the narrow part only if it has a row."""
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    if has_narrow:
        mbarrier.expect(full.index(stage), BLOCK_M * BLOCK_K * 2)
        tma.async_copy_global_to_shared(x_narrow, [row + WIDE, step * BLOCK_K], full.index(stage), narrow.index(stage))
    else:
        mbarrier.expect(full.index(stage), WIDE * BLOCK_K * 2)
    tma.async_copy_global_to_shared(x_wide, [row, step * BLOCK_K], full.index(stage), wide.index(stage))


@gluon.jit
def produce(
    x_wide, x_narrow, w, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
    wide, narrow, panels, full, empty,
    R, K_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy every stage of every tile of this program.

    The first weights are fetched before the kernel before, which makes the rows, has finished.

    Args:
        x_wide, x_narrow: descriptors of the rows ``[rows, K]``, a part at a time; past K they read as zeros.
        w: descriptor of the codes as lines of 128 bytes. Past a matrix's last panel the next one's (or nothing) is
            copied, for rows that are not stored.
    """
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    steps = K_PADDED // BLOCK_K
    done = 0
    early = gl.minimum(steps, STAGES)
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        panel = gl.load(block_expert + m) * PANELS + n * CONSUMERS
        row = gl.load(block_row + m)
        has_narrow = False
        if WIDE < BLOCK_M:
            has_narrow = gl.load(sorted_routes + m * BLOCK_M + WIDE) < R
        if done == 0:
            for step in range(0, early):
                fetch_weights(w, panels, full, step, panel, step, K_PADDED, BLOCK_K)
            wait_for_previous_kernel()
        for step in range(0, steps):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
            if done >= early:
                fetch_weights(w, panels, full, stage, panel, step, K_PADDED, BLOCK_K)
            fetch_rows(x_wide, x_narrow, wide, narrow, full, stage, row, has_narrow, step, BLOCK_M, BLOCK_K)
            done += 1


@gluon.jit
def multiply(
    s_ptrs, wide, narrow, panels, full, empty, done, steps, consumer: gl.constexpr,
    COLUMNS: gl.constexpr, MORE: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """FP32 [64, COLUMNS] and [64, MORE]: this consumer's weight rows times wide and narrow rows of each stage.

    The first COLUMNS of the wide rows and the MORE narrow ones; without the second result if MORE is 0.
    """
    PART_K: gl.constexpr = BLOCK_K // PARTS
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    groups_layout: gl.constexpr = group_layout(PANEL, PART_K, 4)
    fragments = panels._reinterpret(gl.uint8, [STAGES * CONSUMERS, PANEL, BLOCK_K], swizzled_fragments(BLOCK_K))
    acc = gl.zeros([PANEL, COLUMNS], gl.float32, layout=acc_layout)
    more = acc
    if MORE > 0:
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
        more_operand: gl.constexpr = gl.DotOperandLayout(0, more_layout, 2)
        more = gl.zeros([PANEL, MORE], gl.float32, layout=more_layout)
    next_words = gl.load(s_ptrs)
    second_words = gl.load(s_ptrs + gl.minimum(1, steps - 1) * PANEL)
    for step in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        words = next_words
        next_words = second_words
        second_words = gl.load(s_ptrs + gl.minimum(step + 2, steps - 1) * PANEL)
        for part in gl.static_range(PARTS):
            panel = fragments.index(stage * CONSUMERS + consumer).slice(part * PART_K, PART_K, dim=1)
            a = register_operand(panel.load(a_layout), words, part, a_layout, groups_layout)
            rows = wide.index(stage).slice(0, COLUMNS, dim=0).slice(part * PART_K, PART_K, dim=1)
            if MORE > 0:
                b = gl.convert_layout(a, more_operand, assert_trivial=True)
                more_rows = narrow.index(stage).slice(part * PART_K, PART_K, dim=1)
                if part > 0:
                    # the operand is named so that it is made before the wait, not after it
                    acc, more, a, b = warpgroup_mma_wait(0, deps=[acc, more, a, b])
                acc = warpgroup_mma(a, rows.permute((1, 0)), acc, is_async=True)
                more = warpgroup_mma(b, more_rows.permute((1, 0)), more, is_async=True)
            else:
                if part > 0:
                    acc, a = warpgroup_mma_wait(0, deps=[acc, a])
                acc = warpgroup_mma(a, rows.permute((1, 0)), acc, is_async=True)
        # to the end: the assembler would serialise register operands that outlive a step; the other consumers keep the
        # tensor cores busy meanwhile
        if MORE > 0:
            acc, more = warpgroup_mma_wait(0, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage))
        done += 1
    return acc, more, done


@gluon.jit
def consume_tile(
    s_ptrs, block_routes, first_row, panel, wide, narrow, panels, full, empty, done, steps, R,
    consumer: gl.constexpr, store: gl.constexpr, store_args,
    COLUMNS: gl.constexpr, MORE: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One tile of one consumer, for its first COLUMNS routes, or for COLUMNS + MORE."""
    acc, more, done = multiply(
        s_ptrs, wide, narrow, panels, full, empty, done, steps, consumer, COLUMNS, MORE, BLOCK_K, STAGES, PARTS
    )  # fmt: skip
    store(acc, block_routes, first_row, panel, R, store_args)
    if MORE > 0:
        store(more, block_routes + COLUMNS, first_row + COLUMNS, panel, R, store_args)
    return done


@gluon.jit
def consume(
    args, consumer: gl.constexpr, store: gl.constexpr, store_args,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's panel of every tile of this program."""
    (
        w_scale, sorted_routes, block_expert, block_row, m_blocks, n_blocks, wide, narrow, panels, full, empty,
        R, K_PADDED, PANELS,
    ) = args  # fmt: skip
    FEW: gl.constexpr = few_columns(BLOCK_M)
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    steps = K_PADDED // BLOCK_K
    done = 0
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        expert = gl.load(block_expert + m)
        panel = n * CONSUMERS + consumer
        s_ptrs = fragment_scale_pointers(
            w_scale, expert * PANELS + panel, expert * PANELS + PANELS - 1, K_PADDED, PANEL, BLOCK_K // PARTS
        )  # fmt: skip
        block_routes = sorted_routes + m * BLOCK_M
        first_row = gl.load(block_row + m)
        # padding comes last in a block: if it begins at FEW or before, so many columns are enough
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


@gluon.jit
def run_tiles(
    x_wide, x_narrow, w_lines, w_scale, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
    R, K_PADDED, PANELS, store: gl.constexpr, store_args,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """All tiles of this program.

    Args:
        x_wide, x_narrow, w_lines: descriptors, as `produce` takes them.
        w_scale: as `fragment_scale_pointers` takes it.
        store: function of (accumulators [64, columns], pointer to the columns' routes, packed row of the first one, the
            panel, R, store_args).
    """
    wide, narrow, panels = make_rings(BLOCK_M, BLOCK_K, STAGES)
    full, empty = make_barriers(STAGES)
    args = (
        w_scale, sorted_routes, block_expert, block_row, m_blocks, n_blocks, wide, narrow, panels, full, empty,
        R, K_PADDED, PANELS,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (args, 0, store, store_args, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (args, 1, store, store_args, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (args, 2, store, store_args, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (produce, (x_wide, x_narrow, w_lines, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
                       wide, narrow, panels, full, empty, R, K_PADDED, PANELS, BLOCK_M, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 32],  # registers of the partitions but the first, which gets the rest
    )  # fmt: skip


@gluon.jit
def claim(counter):
    """The next tile of all programs'. By one warp."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane, got;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        mov.u32 got, 0;
        @first atom.relaxed.gpu.global.add.u32 got, [$1], 1;
        shfl.sync.idx.b32 $0, got, 0, 31, 0xffffffff;
        }""",
        "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def say_done(counter):
    """Add 1 for each warp, once what it has stored is visible to the copy engines of all multiprocessors."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_until(counter, target):
    """Until the counter has reached ``target``; then what was stored before is there for this program's copies."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred less;
        .reg .b32 now;
        AGAIN:
        ld.acquire.gpu.global.u32 now, [$1];
        setp.lt.s32 less, now, $2;
        @less bra AGAIN;
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [counter, target], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
