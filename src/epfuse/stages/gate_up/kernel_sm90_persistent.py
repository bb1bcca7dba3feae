"""Grouped GEMM1 for Hopper with many rows: gate_up_sm90_kernel's result from specialised warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epfuse.stages.gate_up.kernel_sm90 import guess_weights, store_swiglu
from epfuse.stages.sm90_gemm import (
    fragment_scale_pointers,
    let_next_kernel_start,
    tile_of,
    wait_for_previous_kernel,
)
from epfuse.stages.sm90_persistent import make_barriers, make_rings, multiply, produce


@gluon.jit
def consume(
    w13_scale, out, sorted_routes, block_expert, m_blocks, n_blocks, x_ring, w_ring, full, empty,
    R, H, I, H_PADDED, PANELS, alpha, beta, limit, consumer: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply, activate and store this consumer's half of every tile of this program."""
    done = 0
    for tile in range(gl.program_id(0), m_blocks * n_blocks, gl.num_programs(0)):
        m, n = tile_of(tile, m_blocks, n_blocks, GROUP_M)
        expert = gl.load(block_expert + m)
        s_ptrs = fragment_scale_pointers(
            w13_scale, expert * PANELS + n * (BLOCK_N // 64) + consumer * (BLOCK_N // 128),
            expert * PANELS + PANELS - 1, H_PADDED, BLOCK_N // 2, BLOCK_K // PARTS,
        )  # fmt: skip
        block_routes = sorted_routes + m * BLOCK_M
        first_output = n * (BLOCK_N // 2) + consumer * (BLOCK_N // 4)
        # padding comes last in a block: if its second half begins with padding, half the columns are enough
        if gl.load(block_routes + BLOCK_M // 2) >= R:
            few, done = multiply(
                s_ptrs, x_ring, w_ring, full, empty, done, H_PADDED // BLOCK_K, consumer,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
            store_swiglu(few, out, block_routes, first_output, R, I, alpha, beta, limit)
        else:
            acc, done = multiply(
                s_ptrs, x_ring, w_ring, full, empty, done, H_PADDED // BLOCK_K, consumer,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS,
            )  # fmt: skip
            store_swiglu(acc, out, block_routes, first_output, R, I, alpha, beta, limit)


@gluon.jit(do_not_specialize=["R"])
def gate_up_sm90_persistent_kernel(
    x, w13, w13_lines, w13_scale, out, sorted_routes, block_expert, num_padded,
    R, H, I, H_PADDED, PANELS, LOCAL, FIRST_WAVE, alpha, beta, limit,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, EVEN_K: gl.constexpr,
    GUESS: gl.constexpr,
):  # fmt: skip
    """As gate_up_sm90_kernel; each program takes every num_programs-th tile."""
    if GUESS > 0:
        guess_weights(w13, False, H, I, H_PADDED, PANELS, LOCAL, FIRST_WAVE, BLOCK_N, GROUP_M, GUESS)
    wait_for_previous_kernel()
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_blocks = (PANELS * 64 + BLOCK_N - 1) // BLOCK_N
    x_ring, w_ring = make_rings(BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    full, empty = make_barriers(STAGES)
    gl.warp_specialize(
        [
            (consume, (w13_scale, out, sorted_routes, block_expert, m_blocks, n_blocks,
                       x_ring, w_ring, full, empty, R, H, I, H_PADDED, PANELS, alpha, beta, limit, 0,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (consume, (w13_scale, out, sorted_routes, block_expert, m_blocks, n_blocks,
                       x_ring, w_ring, full, empty, R, H, I, H_PADDED, PANELS, alpha, beta, limit, 1,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, PARTS)),
            (produce, (x, w13_lines, sorted_routes, block_expert, m_blocks, n_blocks, x_ring, w_ring, full, empty,
                       R, H, H_PADDED, PANELS, K,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, EVEN_K, False)),
        ],
        [4, 4],
        [224, 56],  # registers of the second consumer and of the producer; the first consumer gets the rest
    )  # fmt: skip
