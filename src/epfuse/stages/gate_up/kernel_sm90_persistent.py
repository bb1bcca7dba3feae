"""Grouped GEMM1 for Hopper with many rows: gate_up_sm90_kernel's result from specialised warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.stages.gate_up.kernel_sm90 import store_swiglu
from epfuse.stages.sm90_gemm import let_next_kernel_start, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import CONSUMERS, PANEL, run_tiles


@gluon.jit
def store_panel(acc, block_routes, first_row, panel, R, args):
    """Activate and store, packed."""
    out, I, alpha, beta, limit = args
    store_swiglu(acc, out, block_routes, first_row, panel * (PANEL // 2), R, I, alpha, beta, limit)


@gluon.jit(do_not_specialize=["R"])
def gate_up_sm90_persistent_kernel(
    x_wide, x_narrow, w13_lines, w13_scale, out, sorted_routes, block_expert, block_row, num_padded,
    R, I, H_PADDED, PANELS, alpha, beta, limit,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As gate_up_sm90_kernel, for rows that lie packed in the table's order; so do the results.

    The route table is read before the kernel before, which gathers the rows, has finished: it starts this one after it
    has waited for the table.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS + CONSUMERS - 1) // CONSUMERS
    if gl.program_id(0) >= m_blocks * n_blocks:
        wait_for_previous_kernel()
        return
    run_tiles(
        x_wide, x_narrow, w13_lines, w13_scale, sorted_routes, block_expert, block_row, m_blocks, n_blocks,
        R, H_PADDED, PANELS, store_panel, (out, I, alpha, beta, limit), BLOCK_M, BLOCK_K, GROUP_M, STAGES, PARTS,
    )  # fmt: skip
