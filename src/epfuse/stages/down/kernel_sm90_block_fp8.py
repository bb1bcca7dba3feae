"""Grouped GEMM2 for Hopper with FP8 rows and block FP8 weights; rows and results lie packed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.kernel_cache import cached
from epfuse.stages.down.kernel_sm90 import store_weighted
from epfuse.stages.sm90_block_fp8_gemm import run_tiles
from epfuse.stages.sm90_gemm import let_next_kernel_start


@gluon.jit
def store_weighted_rows(
    sums, block_routes, first_row, expert, n, R, args, ACTIVATION: gl.constexpr, COUNT: gl.constexpr
):
    """store_weighted for each of the sums; ACTIVATION is None."""
    bias, topk_weights, out, H, lone_token, final = args
    for i in gl.static_range(COUNT):
        first_column = (n * COUNT + i) * sums[i].shape[0]
        store_weighted(
            sums[i], bias, topk_weights, out, block_routes, first_row, expert, first_column, R, H, lone_token, final
        )  # fmt: skip


# STEPS as in kernel_sm90_fp8.py of gate_up.
@cached
@gluon.jit(do_not_specialize=["R", "STEPS"])
def down_sm90_block_fp8_kernel(
    y, y_scale, w2, w2_scale, bias, topk_weights, out, lone_token, final,
    sorted_routes, block_expert, block_row, num_padded, counter, R, H, STEPS,
    BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[packed row] = router weight * (w2[expert] @ y[packed row] + bias[expert]).

    bias: FP32 [L, H]; None for none. Other arguments as of run_tiles and store_weighted.
    """
    let_next_kernel_start()
    run_tiles(
        w2, w2_scale, y, y_scale, sorted_routes, block_expert, block_row, num_padded, counter, R, STEPS, H,
        store_weighted_rows, None, (bias, topk_weights, out, H, lone_token, final), False,
        BLOCK_M, BLOCKS, GROUP_M, STAGES,
    )  # fmt: skip
