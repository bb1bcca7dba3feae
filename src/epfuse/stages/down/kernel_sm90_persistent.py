"""Grouped GEMM2 for Hopper with many rows: down_sm90_kernel's result from specialised warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.stages.down.kernel_sm90 import store_weighted
from epfuse.stages.sm90_gemm import let_next_kernel_start, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import CONSUMERS, PANEL, run_tiles


@gluon.jit
def store_panel(acc, block_routes, first_row, panel, R, args):
    """Weight and store, packed."""
    topk_weights, out, H = args
    store_weighted(acc, topk_weights, out, block_routes, first_row, panel * PANEL, R, H)


@gluon.jit(do_not_specialize=["R"])
def down_sm90_persistent_kernel(
    y_wide, y_narrow, w2_lines, w2_scale, topk_weights, out, sorted_routes, block_expert, block_row, num_padded,
    R, H, I_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As down_sm90_kernel, for rows that lie packed in the table's order; so do the results."""
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS + CONSUMERS - 1) // CONSUMERS
    if gl.program_id(0) >= m_blocks * n_blocks:
        wait_for_previous_kernel()
        return
    run_tiles(
        y_wide, y_narrow, w2_lines, w2_scale, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
        R, I_PADDED, PANELS, store_panel, (topk_weights, out, H), BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS,
    )  # fmt: skip
