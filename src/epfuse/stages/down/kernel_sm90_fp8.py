"""Grouped GEMM2 for Hopper with FP8 rows and weights, one scale a row each; rows and results lie packed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.down.kernel_sm90 import store_weighted_panel
from epfuse.stages.sm90_fp8_gemm import run_tiles
from epfuse.stages.sm90_gemm import let_next_kernel_start


# STEPS as in kernel_sm90_fp8.py of gate_up.
@cached
@gluon.jit(do_not_specialize=["R", "STEPS", "PANELS"])
def down_sm90_fp8_kernel(
    y_head, y_few, y_rest, y_scale, w2, w2_scale, bias, topk_weights, out, lone_token, final,
    sorted_routes, block_expert, block_row, num_padded, counter, R, H, STEPS, PANELS,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[packed row] = router weight * (w2[expert] @ y[packed row] + bias[expert]).

    bias: FP32 [L, H]; None for none. Other arguments as of run_tiles and store_weighted.
    """
    let_next_kernel_start()
    run_tiles(
        w2, w2_scale, (y_head, y_few, y_rest), y_scale,
        sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, PANELS,
        store_weighted_panel, None, (bias, topk_weights, out, H, lone_token, final),
        BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES,
    )  # fmt: skip
