"""Grouped GEMM1 for Hopper with FP8 rows and weights, one scale a row each; rows and results lie packed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.gate_up.kernel_sm90 import store_activated_panel
from epfuse.stages.sm90_fp8_gemm import run_tiles
from epfuse.stages.sm90_gemm import let_next_kernel_start


# A STEPS of 1 would be a constant, and for that code ptxas 12.8 (triton 3.6) reads uniform registers of another branch.
@cached
@gluon.jit(do_not_specialize=["R", "STEPS", "PANELS"])
def gate_up_sm90_fp8_kernel(
    x_head, x_few, x_rest, x_scale, w13, w13_scale, bias, y,
    sorted_routes, block_expert, block_row, num_padded, counter, R, I, STEPS, PANELS, activation,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """y[packed row] = activate(w13[expert] @ x[packed row] + bias[expert]); arguments as of run_tiles.

    bias: FP32 [L, 2I], gate before up; None for none.
    """
    let_next_kernel_start()
    run_tiles(
        w13, w13_scale, (x_head, x_few, x_rest), x_scale,
        sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, PANELS,
        store_activated_panel, ACTIVATION, (bias, y, I, activation), BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES,
    )  # fmt: skip
