"""Grouped GEMM1 with SwiGLU in the epilogue and two weight tiles a step: gate and up each have their own."""

import triton
import triton.language as tl

from epfuse.stages.activation import activate
from epfuse.stages.grouped_gemm import tile_of


@triton.jit(do_not_specialize=["R"])
def two_tiles_kernel(
    x, w13, out, sorted_routes, block_expert, num_padded,
    R, H, I, activation,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As gate_up_kernel, but BLOCK_N gate and BLOCK_N up rows have tiles and dots of their own; H % BLOCK_K == 0."""
    pid = tl.program_id(0)
    m_blocks = tl.load(num_padded) // BLOCK_M
    n_blocks = tl.cdiv(I, BLOCK_N)
    if pid >= m_blocks * n_blocks:
        return
    m, n = tile_of(pid, m_blocks, n_blocks, GROUP_M)
    expert = tl.load(block_expert + m).to(tl.int64)
    routes = tl.load(sorted_routes + m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = routes < R
    tokens = tl.where(live, routes // K, 0).to(tl.int64)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = expert * 2 * I + tl.minimum(columns, I - 1)
    steps = tl.arange(0, BLOCK_K)
    a_ptrs = x + tokens[:, None] * H + steps[None, :]
    gate_ptrs = w13 + rows[:, None] * H + steps[None, :]
    up_ptrs = w13 + (rows + I)[:, None] * H + steps[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, H, BLOCK_K):
        a = tl.load(a_ptrs)
        gate = tl.dot(a, tl.trans(tl.load(gate_ptrs)), gate)
        up = tl.dot(a, tl.trans(tl.load(up_ptrs)), up)
        a_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    kind: tl.constexpr = out.dtype.element_ty
    y = activate(gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32), activation, ACTIVATION).to(kind)
    where = routes.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(out + where, y, mask=live[:, None] & (columns < I)[None, :])
