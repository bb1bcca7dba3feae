"""Device code of a grouped GEMM of BF16 rows times dense weights for Hopper, both from shared memory.

Producer, consumers and ring as in sm90_persistent.py; the copy engine brings weights as checkpoints have them. A
consumer has one or two panels of 64 weight rows; or two consumers have one each and share the one between, half of the
columns each. In gate_up a panel is 8 gate rows and their 8 up rows in turn, which lie far apart in w13: one box of a
view of four dimensions brings them, and one thread gets those that belong together.

A step is given back to the producer while the next one is multiplied: operands in shared memory take no registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from epfuse.stages.sm90_persistent import PANEL, column_steps

BLOCK_K = gl.constexpr(64)  # a line of 128 bytes
RUN = gl.constexpr(8)  # gate rows, or up rows, that follow one another in a panel


@gluon.constexpr_function
def line_layout(rank):
    """Shared memory of boxes of lines."""
    return gl.NVMMASharedLayout(128, 16, rank)


@gluon.constexpr_function
def dense_steps(block_m, head):
    """column_steps, and before them few columns of a large head: the rest of an expert's rows in a block of its own."""
    steps = column_steps(block_m, head)
    rest = block_m - head
    return [(rest, 0), *steps] if rest and head >= 256 and steps[0][0] == head else steps


@gluon.constexpr_function
def last_step(block_m, head):
    """The index of the last of dense_steps."""
    return len(dense_steps(block_m, head)) - 1


@gluon.constexpr_function
def head_columns(block_m, head, step):
    """Columns of the head in one of dense_steps."""
    return dense_steps(block_m, head)[step][0]


@gluon.constexpr_function
def rest_columns(block_m, head, step):
    """Columns of the rest in one of dense_steps."""
    return dense_steps(block_m, head)[step][1]


@gluon.constexpr_function
def all_columns(block_m, head, step):
    """Columns of one of dense_steps."""
    return sum(dense_steps(block_m, head)[step])


@gluon.jit
def step_of(block_routes, R, BLOCK_M: gl.constexpr, HEAD: gl.constexpr):
    """The first of dense_steps that has all routes of a block: padding comes last, and need not be multiplied."""
    step = 0
    for i in gl.static_range(last_step(BLOCK_M, HEAD)):
        step += (gl.load(block_routes + all_columns(BLOCK_M, HEAD, i)) < R).to(gl.int32)
    return step


@gluon.jit
def make_panels(PANELS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of the weights: PANELS panels a stage."""
    return gl.allocate_shared_memory(gl.bfloat16, [STAGES * PANELS, PANEL, BLOCK_K], line_layout(2))


@gluon.jit
def fetch_gate_up(w, panels, full, stage, expert, panel, step, RUNS, PANELS: gl.constexpr):
    """Start the copies of one stage of w13's weights: panels of alternating gate and up rows.

    Args:
        w: descriptor of w13 as ``[runs of 8 rows, gate or up, 8, H]``, boxes of a panel's rows and 64 columns.
        panel: first one of the tile.
        RUNS: runs of an expert, gate and up.
    """
    mbarrier.expect(full.index(stage), PANELS * PANEL * BLOCK_K * 2)
    for i in gl.static_range(PANELS):
        run = expert * RUNS + (panel + i) * (PANEL // (2 * RUN))
        place = panels.index(stage * PANELS + i)._reinterpret(
            gl.bfloat16, [PANEL // (2 * RUN), 2, RUN, BLOCK_K], line_layout(4)
        )
        tma.async_copy_global_to_shared(w, [run, 0, 0, step * BLOCK_K], full.index(stage), place)


@gluon.jit
def fetch_down(w, panels, full, stage, expert, panel, step, ROWS, PANELS: gl.constexpr):
    """Start the copies of one stage of w2's weights.

    Args:
        w: descriptor of w2 as ``[L * H, I]``, boxes of 64 rows and columns.
        panel: first one of the tile.
        ROWS: H.
    """
    mbarrier.expect(full.index(stage), PANELS * PANEL * BLOCK_K * 2)
    for i in gl.static_range(PANELS):
        line = expert * ROWS + (panel + i) * PANEL
        tma.async_copy_global_to_shared(w, [line, step * BLOCK_K], full.index(stage), panels.index(stage * PANELS + i))


@gluon.jit
def parts_of(ring, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """A ring of rows, cut into parts of ROWS, and how many a stage has."""
    PARTS: gl.constexpr = ring.shape[1] // ROWS
    return ring._reinterpret(gl.bfloat16, [STAGES * PARTS, ROWS, BLOCK_K], line_layout(2)), PARTS


@gluon.jit
def multiply(
    heads, rests, panels, full, empty, done, steps, consumer,
    COLUMNS: gl.constexpr, MORE: gl.constexpr, PANELS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This consumer's weight rows times rows of each stage: the first COLUMNS of the head, the first MORE of the rest.

    Returns:
        FP32 sums of its first panel, [64, COLUMNS] and [64, MORE]; then those of its second one, or of its half of the
        columns of the panel that it shares. Sums that there are none of are others again.
    """
    SHARED: gl.constexpr = PANELS % CONSUMERS > 0
    TWO: gl.constexpr = PANELS > CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([PANEL, COLUMNS], gl.float32, layout=layout)
    more = acc
    second = acc
    second_more = acc
    if TWO:
        HALF: gl.constexpr = COLUMNS // 2 if SHARED else COLUMNS
        half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        second = gl.zeros([PANEL, HALF], gl.float32, layout=half_layout)
        head_parts, HEAD_PARTS = parts_of(heads, HALF, STAGES)
    if MORE > 0:
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
        more = gl.zeros([PANEL, MORE], gl.float32, layout=more_layout)
        if TWO:
            HALF_MORE: gl.constexpr = MORE // 2 if SHARED else MORE
            half_more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_MORE, 16])
            second_more = gl.zeros([PANEL, HALF_MORE], gl.float32, layout=half_more_layout)
            rest_parts, REST_PARTS = parts_of(rests, HALF_MORE, STAGES)
    panel = consumer
    second_panel = consumer
    part = 0
    if SHARED:
        panel = consumer * 2
        second_panel = 1
        part = consumer
    elif TWO:
        panel = consumer * 2
        second_panel = consumer * 2 + 1
    for step in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        a = panels.index(stage * PANELS + panel)
        acc = warpgroup_mma(a, heads.index(stage).slice(0, COLUMNS, dim=0).permute((1, 0)), acc, is_async=True)
        if TWO:
            b = panels.index(stage * PANELS + second_panel)
            rows = head_parts.index(stage * HEAD_PARTS + part)
            second = warpgroup_mma(b, rows.permute((1, 0)), second, is_async=True)
        if MORE > 0:
            more_rows = rests.index(stage).slice(0, MORE, dim=0)
            more = warpgroup_mma(a, more_rows.permute((1, 0)), more, is_async=True)
            if TWO:
                part_rows = rest_parts.index(stage * REST_PARTS + part)
                second_more = warpgroup_mma(b, part_rows.permute((1, 0)), second_more, is_async=True)
        # all but this step's products are through
        if TWO and MORE > 0:
            acc, second, more, second_more = warpgroup_mma_wait(4, deps=[acc, second, more, second_more])
        elif TWO:
            acc, second = warpgroup_mma_wait(2, deps=[acc, second])
        elif MORE > 0:
            acc, more = warpgroup_mma_wait(2, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), pred=step > 0)
        done += 1
    if TWO and MORE > 0:
        acc, second, more, second_more = warpgroup_mma_wait(0, deps=[acc, second, more, second_more])
    elif TWO:
        acc, second = warpgroup_mma_wait(0, deps=[acc, second])
    elif MORE > 0:
        acc, more = warpgroup_mma_wait(0, deps=[acc, more])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES))
    return acc, more, second, second_more, done
