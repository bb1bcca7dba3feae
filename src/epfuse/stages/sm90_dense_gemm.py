"""Device code of a grouped GEMM of BF16 rows times dense weights for Hopper, both from shared memory.

Producer, consumers and ring as in sm90_persistent.py; the copy engine brings weights as checkpoints have them. A
consumer has one or two panels of 64 weight rows. In gate_up a panel is 8 gate rows and their 8 up rows in turn, which
lie far apart in w13: one box of a view of four dimensions brings them, and one thread gets those that belong together.

A step is given back to the producer while the next one is multiplied: operands in shared memory take no registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from epfuse.stages.sm90_persistent import PANEL

CONSUMERS = gl.constexpr(2)
BLOCK_K = gl.constexpr(64)  # a line of 128 bytes
RUN = gl.constexpr(8)  # gate rows, or up rows, that follow one another in a panel


@gluon.constexpr_function
def line_layout(rank):
    """Shared memory of boxes of lines."""
    return gl.NVMMASharedLayout(128, 16, rank)


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
def multiply(
    heads, rests, panels, full, empty, done, steps, consumer,
    COLUMNS: gl.constexpr, MORE: gl.constexpr, EACH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """FP32 [64, COLUMNS] and [64, MORE] of this consumer's first panel, and of its second: weights times rows.

    The first COLUMNS of the head and the first MORE of the rest. The sums of a rest are those of the head again if MORE
    is 0, and those of the second panel those of the first if EACH is 1.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([PANEL, COLUMNS], gl.float32, layout=layout)
    more = acc
    if MORE > 0:
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
        more = gl.zeros([PANEL, MORE], gl.float32, layout=more_layout)
    second = acc
    second_more = more
    for step in range(0, steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        first_panel = stage * (CONSUMERS * EACH) + consumer * EACH
        a = panels.index(first_panel)
        rows = heads.index(stage).slice(0, COLUMNS, dim=0).permute((1, 0))
        acc = warpgroup_mma(a, rows, acc, is_async=True)
        if EACH == 2:
            b = panels.index(first_panel + 1)
            second = warpgroup_mma(b, rows, second, is_async=True)
        if MORE > 0:
            more_rows = rests.index(stage).slice(0, MORE, dim=0).permute((1, 0))
            more = warpgroup_mma(a, more_rows, more, is_async=True)
            if EACH == 2:
                second_more = warpgroup_mma(b, more_rows, second_more, is_async=True)
        # all but this step's products are through
        if EACH == 2 and MORE > 0:
            acc, second, more, second_more = warpgroup_mma_wait(4, deps=[acc, second, more, second_more])
        elif EACH == 2:
            acc, second = warpgroup_mma_wait(2, deps=[acc, second])
        elif MORE > 0:
            acc, more = warpgroup_mma_wait(2, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), pred=step > 0)
        done += 1
    if EACH == 2 and MORE > 0:
        acc, second, more, second_more = warpgroup_mma_wait(0, deps=[acc, second, more, second_more])
    elif EACH == 2:
        acc, second = warpgroup_mma_wait(0, deps=[acc, second])
    elif MORE > 0:
        acc, more = warpgroup_mma_wait(0, deps=[acc, more])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES))
    return acc, more, second, second_more, done
