"""The activation as a launch of its own: the unfused twin of gate_up's epilogue."""

import triton
import triton.language as tl

from epfuse.stages.activation import activate


@triton.jit
def activation_kernel(gate_up, out, width, activation, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, up, activation, ACTIVATION)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)
