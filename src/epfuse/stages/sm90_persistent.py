"""Device code of both GEMMs for Hopper where there are many rows: one program per multiprocessor, warps specialised.

MXFP8 weights in fragment order only. A producer (4 warps) fills a ring in shared memory, the weights by the tensor
copy engine, the gathered rows by asynchronous copies, and runs ahead, into the next tile too. Two consumers (a
warpgroup each) multiply: each has half of the tile's weight rows and all of its routed rows, and neither waits for the
other, so that one dequantises while the other one's wgmma runs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from epfuse.stages.sm90_gemm import (
    copy_rows,
    group_layout,
    powers,
    register_operand,
    row_copy_layout,
    row_pointers,
    tile_of,
    wait_for_previous_kernel,
)

PRODUCER_THREADS = gl.constexpr(128)
CONSUMERS = gl.constexpr(2)


@gluon.constexpr_function
def swizzled_fragments(rows, block_k):
    """Shared memory offset -> (row, k) of the panels of one stage, behind the copy engine's 128-byte swizzle.

    As fragment_shared; the swizzle adds address bits 7 to 9 to bits 4 to 6, so what a bit of the first three stands
    for also holds what the second three do.
    """
    bases = [[0, 1], [8, 0], [0, 8], [0, 16]]  # the 16 bytes of a thread
    bases += [[0, 2], [0, 4], [1, 0], [2, 2], [4, 4], [17, 0], [32, 0]]  # the 128 threads
    bases += [[0, k] for k in powers(32, block_k)]
    bases += [[n, 0] for n in powers(64, rows)]
    return gl.SharedLinearLayout(bases)


@gluon.jit
def make_rings(
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Shared memory of the rows, and of the weights: one entry a panel."""
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], gl.NVMMASharedLayout(128, 16, 2))
    w_ring = gl.allocate_shared_memory(
        gl.uint8, [STAGES * (BLOCK_N // 64), 64 * BLOCK_K // 128, 128], gl.NVMMASharedLayout(128, 8, 2)
    )
    return x_ring, w_ring


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """Per stage: weights and every producer thread's copies have arrived; both consumers are through with it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=PRODUCER_THREADS + 1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def fetch_weights(
    w, w_ring, full, stage, panel, step, K_PADDED,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Start the copies of one stage of weights, a panel each."""
    LINES: gl.constexpr = 64 * BLOCK_K // 128  # lines of 128 bytes that a panel has in a stage
    PANELS: gl.constexpr = BLOCK_N // 64
    mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K)
    for i in gl.static_range(PANELS):
        line = (panel + i) * (K_PADDED // 2) + step * LINES
        tma.async_copy_global_to_shared(w, [line, 0], full.index(stage), w_ring.index(stage * PANELS + i))


@gluon.jit
def produce(
    x, w, sorted_routes, block_expert, m_blocks, n_blocks, x_ring, w_ring, full, empty,
    R, K, K_PADDED, PANELS,
    ROUTES_PER_ROW: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, EVEN_K: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Copy every stage of every tile of this program; routed row r is row ``r // ROUTES_PER_ROW`` of x.

    w is a descriptor of the codes as lines of 128 bytes. Past a matrix's last panel the next one's (or nothing) is
    copied, for rows that are not stored.
    """
    copy_layout: gl.constexpr = row_copy_layout(BLOCK_K, gl.num_warps())
    steps = K_PADDED // BLOCK_K
    done = 0
    early = 0  # stages whose weights were fetched before the kernel before had finished
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        panel = gl.load(block_expert + m) * PANELS + n * (BLOCK_N // 64)
        routes = gl.load(sorted_routes + m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy_layout)))
        x_ptrs = row_pointers(x, (routes // ROUTES_PER_ROW).to(gl.int64) * K, BLOCK_K)
        if WAIT:
            if done == 0:
                early = gl.minimum(steps, STAGES)
                for step in range(0, early):
                    fetch_weights(w, w_ring, full, step, panel, step, K_PADDED, BLOCK_N, BLOCK_K)
                wait_for_previous_kernel()
        for step in range(0, steps):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
            if done >= early:
                fetch_weights(w, w_ring, full, stage, panel, step, K_PADDED, BLOCK_N, BLOCK_K)
            copy_rows(x_ring.index(stage), x_ptrs, routes < R, step * BLOCK_K, K, EVEN_K)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            done += 1


@gluon.jit
def multiply(
    s_ptrs, x_ring, w_ring, full, empty, done, steps, consumer: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """FP32 [BLOCK_N / 2, COLUMNS]: this consumer's weight rows times the first COLUMNS rows of each stage."""
    ROWS: gl.constexpr = BLOCK_N // CONSUMERS
    PART_K: gl.constexpr = BLOCK_K // PARTS
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    groups_layout: gl.constexpr = group_layout(ROWS, PART_K, 4)
    fragments = w_ring._reinterpret(
        gl.uint8, [STAGES * CONSUMERS, ROWS, BLOCK_K], swizzled_fragments(ROWS, BLOCK_K)
    )  # fmt: skip
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout=acc_layout)
    next_words = gl.load(s_ptrs)
    second_words = gl.load(s_ptrs + gl.minimum(1, steps - 1) * 64)
    for step in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        fence_async_shared()
        words = next_words
        next_words = second_words
        second_words = gl.load(s_ptrs + gl.minimum(step + 2, steps - 1) * 64)
        for part in gl.static_range(PARTS):
            codes = fragments.index(stage * CONSUMERS + consumer).slice(part * PART_K, PART_K, dim=1).load(a_layout)
            a = register_operand(codes, words, part, a_layout, groups_layout)
            if part > 0:  # made while the part before was multiplied; one at a time, or its registers don't suffice
                acc = warpgroup_mma_wait(0, deps=[acc])
            rows = x_ring.index(stage).slice(0, COLUMNS, dim=0).slice(part * PART_K, PART_K, dim=1)
            acc = warpgroup_mma(a, rows.permute((1, 0)), acc, is_async=True)
        # to the end: the assembler would serialise register operands that outlive a step; the other consumer keeps the
        # tensor cores busy meanwhile
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage))
        done += 1
    return acc, done
