"""How a tile of either GEMM is multiplied where there are many rows: MXFP8 weights in fragment order, BF16 rows.

A consumer dequantises while the wgmma of the others runs. Three have more instructions in flight; two have registers
for twice the routed rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from epfuse.stages.down.kernel_sm90 import store_weighted_panel
from epfuse.stages.gate_up.kernel_sm90 import store_activated_panel
from epfuse.stages.sm90_codes import register_operand
from epfuse.stages.sm90_gemm import fragment_scale_pointers
from epfuse.stages.sm90_layouts import group_layout, powers
from epfuse.stages.sm90_persistent import PANEL, head_columns, number_of_steps, rest_columns, step_of

WORD_K = gl.constexpr(128)  # k that a scale word is for; a stage of the ring has all of it or half


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
def make_panels(BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of the weights' panels."""
    return gl.allocate_shared_memory(
        gl.uint8, [STAGES * CONSUMERS, PANEL * BLOCK_K // 128, 128], gl.NVMMASharedLayout(128, 8, 2)
    )


@gluon.jit
def fetch_weights(w, panels, full, stage, panel, step, K_PADDED, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr):
    """Start the copies of one stage of weights, a panel each."""
    LINES: gl.constexpr = PANEL * BLOCK_K // 128  # lines of 128 bytes that a panel has in a stage
    mbarrier.expect(full.index(stage), CONSUMERS * PANEL * BLOCK_K)
    for i in gl.static_range(CONSUMERS):
        line = (panel + i) * (K_PADDED // 2) + step * LINES
        tma.async_copy_global_to_shared(w, [line, 0], full.index(stage), panels.index(stage * CONSUMERS + i))


@gluon.jit
def multiply(
    s_ptrs, heads, rests, panels, full, empty, done, words_of_row, consumer,
    COLUMNS: gl.constexpr, MORE: gl.constexpr,
    BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """FP32 [64, COLUMNS] and [64, MORE]: this consumer's weight rows times rows of each stage.

    The first COLUMNS of the head and the first MORE of the rest; without the second result if MORE is 0.
    """
    PART_K: gl.constexpr = WORD_K // PARTS
    STAGE_PARTS: gl.constexpr = BLOCK_K // PART_K
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
    second_words = gl.load(s_ptrs + gl.minimum(1, words_of_row - 1) * PANEL)
    for word in range(0, words_of_row):
        words = next_words
        next_words = second_words
        second_words = gl.load(s_ptrs + gl.minimum(word + 2, words_of_row - 1) * PANEL)
        for part in gl.static_range(PARTS):
            stage = (done + part // STAGE_PARTS) % STAGES
            if part % STAGE_PARTS == 0:
                mbarrier.wait(full.index(stage), ((done + part // STAGE_PARTS) // STAGES) & 1)
            panel = fragments.index(stage * CONSUMERS + consumer).slice(part % STAGE_PARTS * PART_K, PART_K, dim=1)
            a = register_operand(panel.load(a_layout), words, part, a_layout, groups_layout)
            rows = heads.index(stage).slice(0, COLUMNS, dim=0).slice(part % STAGE_PARTS * PART_K, PART_K, dim=1)
            if MORE > 0:
                b = gl.convert_layout(a, more_operand, assert_trivial=True)
                more_rows = rests.index(stage).slice(0, MORE, dim=0).slice(part % STAGE_PARTS * PART_K, PART_K, dim=1)
                if part > 0:
                    # the operand is named so that it is made before the wait, not after it
                    acc, more, a, b = warpgroup_mma_wait(0, deps=[acc, more, a, b])
            elif part > 0:
                acc, a = warpgroup_mma_wait(0, deps=[acc, a])
            if part > 0 and part % STAGE_PARTS == 0:
                mbarrier.arrive(empty.index((done + part // STAGE_PARTS - 1) % STAGES))
            acc = warpgroup_mma(a, rows.permute((1, 0)), acc, is_async=True)
            if MORE > 0:
                more = warpgroup_mma(b, more_rows.permute((1, 0)), more, is_async=True)
        # to the end: the assembler would serialise register operands that outlive a step; the other consumers keep the
        # tensor cores busy meanwhile
        if MORE > 0:
            acc, more = warpgroup_mma_wait(0, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        done += PARTS // STAGE_PARTS
        mbarrier.arrive(empty.index((done - 1) % STAGES))
    return acc, more, done


@gluon.jit
def store_panel(acc, place, store_args, ACTIVATION: gl.constexpr, FIRST: gl.constexpr):
    """Store accumulators of a block's columns from FIRST on, as gate_up does or as down does."""
    block_routes, first_row, expert, panel, R = place
    up, up_store, down_store = store_args
    block_routes += FIRST
    first_row += FIRST
    if up:
        store_activated_panel(acc, block_routes, first_row, expert, panel, R, up_store, ACTIVATION)
    else:
        store_weighted_panel(acc, block_routes, first_row, expert, panel, R, down_store, None)


@gluon.jit
def multiply_head(
    step, ring, place, store_args, consumer, ACTIVATION: gl.constexpr,
    I: gl.constexpr, BLOCK_M: gl.constexpr, HEAD: gl.constexpr,
    BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """`multiply` with the step-th of column_steps, which is the I-th or a later one: all of them have the whole head.

    Returns the sums of the head, so that there is one copy of the code that stores them; those of the rest are stored.
    """
    LAST: gl.constexpr = number_of_steps(BLOCK_M, HEAD) - 1
    if I == LAST or step == I:
        acc, done = multiply_step(
            ring, place, store_args, consumer, ACTIVATION, I, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS
        )  # fmt: skip
    else:
        acc, done = multiply_head(
            step, ring, place, store_args, consumer, ACTIVATION, I + 1, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS
        )  # fmt: skip
    return acc, done


@gluon.jit
def multiply_step(
    ring, place, store_args, consumer, ACTIVATION: gl.constexpr,
    I: gl.constexpr, BLOCK_M: gl.constexpr, HEAD: gl.constexpr,
    BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """`multiply` with the I-th of column_steps; the rest's sums are stored, the head's returned."""
    COLUMNS: gl.constexpr = head_columns(BLOCK_M, HEAD, I)
    MORE: gl.constexpr = rest_columns(BLOCK_M, HEAD, I)
    s_ptrs, heads, rests, panels, full, empty, done, words_of_row = ring
    acc, more, done = multiply(
        s_ptrs, heads, rests, panels, full, empty, done, words_of_row, consumer, COLUMNS, MORE,
        BLOCK_K, CONSUMERS, STAGES, PARTS,
    )  # fmt: skip
    if MORE > 0:
        store_panel(more, place, store_args, ACTIVATION, COLUMNS)
    return acc, done


@gluon.jit
def consume_tile(
    w_scale, K_PADDED, PANELS, m, n, sorted_routes, block_expert, block_row, heads, rests, panels, full, empty, done, R,
    store_args, consumer, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's panel of tile (m, n); done counts the ring's stages since the launch.

    One main loop for each of column_steps serves both GEMMs, which differ in operands and in what store_args says:
    (whether it is gate_up, arguments of store_activated_panel, arguments of store_weighted_panel).
    """
    expert = gl.load(block_expert + m)
    panel = n * CONSUMERS + consumer
    s_ptrs = fragment_scale_pointers(
        w_scale, expert * PANELS + panel, expert * PANELS + PANELS - 1, K_PADDED, PANEL, WORD_K // PARTS
    )  # fmt: skip
    block_routes = sorted_routes + m * BLOCK_M
    place = (block_routes, gl.load(block_row + m), expert, panel, R)
    ring = (s_ptrs, heads, rests, panels, full, empty, done, K_PADDED // WORD_K)
    step = step_of(block_routes, R, BLOCK_M, HEAD)
    if head_columns(BLOCK_M, HEAD, 0) < HEAD:
        if step == 0:
            few, done = multiply_step(
                ring, place, store_args, consumer, ACTIVATION, 0, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS
            )  # fmt: skip
            store_panel(few, place, store_args, ACTIVATION, 0)
        else:
            acc, done = multiply_head(
                step, ring, place, store_args, consumer, ACTIVATION, 1, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS
            )  # fmt: skip
            store_panel(acc, place, store_args, ACTIVATION, 0)
    else:
        acc, done = multiply_head(
            step, ring, place, store_args, consumer, ACTIVATION, 0, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS
        )  # fmt: skip
        store_panel(acc, place, store_args, ACTIVATION, 0)
    return done
