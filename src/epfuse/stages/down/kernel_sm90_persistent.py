"""Grouped GEMM2 for Hopper with many rows: down_sm90_kernel's result from specialised warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.stages.down.kernel_sm90 import store_weighted
from epfuse.stages.sm90_gemm import (
    fragment_scale_pointers,
    let_next_kernel_start,
    tile_of,
    wait_for_previous_kernel,
)
from epfuse.stages.sm90_persistent import (
    CONSUMERS,
    PANEL,
    few_columns,
    make_barriers,
    make_rings,
    multiply,
    produce,
    wide_part,
)


@gluon.jit
def consume_tile(
    s_ptrs, topk_weights, out, block_routes, first_column, wide, narrow, panels, full, empty, done,
    R, H, I_PADDED, consumer: gl.constexpr,
    COLUMNS: gl.constexpr, MORE: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One tile of one consumer, for its first COLUMNS routes, or for COLUMNS + MORE."""
    acc, more, done = multiply(
        s_ptrs, wide, narrow, panels, full, empty, done, I_PADDED // BLOCK_K, consumer,
        COLUMNS, MORE, BLOCK_K, STAGES, PARTS,
    )  # fmt: skip
    store_weighted(acc, topk_weights, out, block_routes, first_column, R, H)
    if MORE > 0:
        store_weighted(more, topk_weights, out, block_routes + COLUMNS, first_column, R, H)
    return done


@gluon.jit
def consume(
    args, consumer: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply, weight and store this consumer's panel of every tile of this program."""
    (
        w2_scale, topk_weights, out, sorted_routes, block_expert, m_blocks, n_blocks,
        wide, narrow, panels, full, empty, R, H, I_PADDED, PANELS,
    ) = args  # fmt: skip
    FEW: gl.constexpr = few_columns(BLOCK_M)
    WIDE: gl.constexpr = wide_part(BLOCK_M)
    done = 0
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        expert = gl.load(block_expert + m)
        s_ptrs = fragment_scale_pointers(
            w2_scale, expert * PANELS + n * CONSUMERS + consumer,
            expert * PANELS + PANELS - 1, I_PADDED, PANEL, BLOCK_K // PARTS,
        )  # fmt: skip
        block_routes = sorted_routes + m * BLOCK_M
        first_column = (n * CONSUMERS + consumer) * PANEL
        # padding comes last in a block: if it begins at FEW or before, so many columns are enough
        if gl.load(block_routes + FEW) >= R:
            done = consume_tile(
                s_ptrs, topk_weights, out, block_routes, first_column, wide, narrow, panels, full, empty, done,
                R, H, I_PADDED, consumer, FEW, 0, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
        else:
            done = consume_tile(
                s_ptrs, topk_weights, out, block_routes, first_column, wide, narrow, panels, full, empty, done,
                R, H, I_PADDED, consumer, WIDE, BLOCK_M - WIDE, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["R"])
def down_sm90_persistent_kernel(
    y_wide, y_narrow, w2_lines, w2_scale, topk_weights, out, sorted_routes, block_expert, block_row, num_padded,
    R, H, I_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As down_sm90_kernel, for rows that lie packed in the table's order; the results lie by route."""
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS + CONSUMERS - 1) // CONSUMERS
    if gl.program_id(0) >= m_blocks * n_blocks:
        wait_for_previous_kernel()
        return
    wide, narrow, panels = make_rings(BLOCK_M, BLOCK_K, STAGES)
    full, empty = make_barriers(STAGES)
    args = (
        w2_scale, topk_weights, out, sorted_routes, block_expert, m_blocks, n_blocks,
        wide, narrow, panels, full, empty, R, H, I_PADDED, PANELS,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (args, 0, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (args, 1, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (args, 2, BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (produce, (y_wide, y_narrow, w2_lines, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
                       wide, narrow, panels, full, empty, R, I_PADDED, PANELS, BLOCK_M, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 32],  # registers of the partitions but the first, which gets the rest
    )  # fmt: skip
