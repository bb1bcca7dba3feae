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
from epfuse.stages.sm90_persistent import make_barriers, make_rings, multiply, produce


@gluon.jit
def consume(
    w2_scale, topk_weights, out, sorted_routes, block_expert, m_blocks, n_blocks, x_ring, w_ring, full, empty,
    R, H, I_PADDED, PANELS, consumer: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply, weight and store this consumer's half of every tile of this program."""
    done = 0
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        expert = gl.load(block_expert + m)
        s_ptrs = fragment_scale_pointers(
            w2_scale, expert * PANELS + n * (BLOCK_N // 64) + consumer * (BLOCK_N // 128),
            expert * PANELS + PANELS - 1, I_PADDED, BLOCK_N // 2, BLOCK_K // PARTS,
        )  # fmt: skip
        block_routes = sorted_routes + m * BLOCK_M
        first_column = n * BLOCK_N + consumer * (BLOCK_N // 2)
        # padding comes last in a block: if its second half begins with padding, half the columns are enough
        if gl.load(block_routes + BLOCK_M // 2) >= R:
            few, done = multiply(
                s_ptrs, x_ring, w_ring, full, empty, done, I_PADDED // BLOCK_K, consumer,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
            store_weighted(few, topk_weights, out, block_routes, first_column, R, H)
        else:
            acc, done = multiply(
                s_ptrs, x_ring, w_ring, full, empty, done, I_PADDED // BLOCK_K, consumer,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
            store_weighted(acc, topk_weights, out, block_routes, first_column, R, H)


@gluon.jit(do_not_specialize=["R"])
def down_sm90_persistent_kernel(
    y, w2_lines, w2_scale, topk_weights, out, sorted_routes, block_expert, num_padded,
    R, H, I, I_PADDED, PANELS,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """As down_sm90_kernel; each program takes every num_programs-th tile."""
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    if gl.program_id(0) >= m_blocks * n_blocks:
        wait_for_previous_kernel()
        return
    x_ring, w_ring = make_rings(BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    full, empty = make_barriers(STAGES)
    gl.warp_specialize(
        [
            (consume, (w2_scale, topk_weights, out, sorted_routes, block_expert, m_blocks, n_blocks,
                       x_ring, w_ring, full, empty, R, H, I_PADDED, PANELS, 0,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (w2_scale, topk_weights, out, sorted_routes, block_expert, m_blocks, n_blocks,
                       x_ring, w_ring, full, empty, R, H, I_PADDED, PANELS, 1,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (produce, (y, w2_lines, sorted_routes, block_expert, m_blocks, n_blocks, x_ring, w_ring, full, empty,
                       R, I, I_PADDED, PANELS, 1,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, EVEN_K, True)),
        ],
        [4, 4],
        [224, 56],  # registers of the second consumer and of the producer; the first consumer gets the rest
    )  # fmt: skip
