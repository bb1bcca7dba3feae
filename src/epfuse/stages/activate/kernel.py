"""The activation and quantisation between the two FP8 GEMMs, for local rows only."""

import triton
import triton.language as tl

from epfuse.kernel_cache import cached
from epfuse.stages.activation import activate
from epfuse.stages.quantize.kernel import quantize_block, widen


@cached
@triton.jit(do_not_specialize=["R"])
def activate_kernel(
    gate_up, codes, scales, sorted_routes, num_padded,
    R, I, G, activation,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, FNUZ: tl.constexpr,
    ACTIVATION: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """codes[r, i], scales[r, g] of activate(gate_up[r, i], gate_up[r, I + i]) in G = ceil(I / GROUP) groups.

    With INPUTS 1 there is no gate, and gate_up is [R, I].

    A program takes BLOCK_R slots of the route table, so that only rows of local routes are read or written.
    """
    first = tl.program_id(0) * BLOCK_R
    if first >= tl.load(num_padded):
        return
    routes = tl.load(sorted_routes + first + tl.arange(0, BLOCK_R)).to(tl.int64)
    live = (routes < R)[:, None]
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    columns = (groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    inside = live[:, :, None] & (columns < I)
    source = gate_up + routes[:, None, None] * (INPUTS * I) + columns
    gate = widen(tl.load(source, mask=inside, other=0.0))
    up = None
    if INPUTS == 2:
        up = widen(tl.load(source + I, mask=inside, other=0.0))
    # not rounded in between: the quantisation is the activation's one rounding
    code, scale = quantize_block(tl.where(inside, activate(gate, up, activation, ACTIVATION), 0.0), FNUZ)
    tl.store(codes + routes[:, None, None] * I + columns, code, mask=inside)
    tl.store(scales + routes[:, None] * G + groups[None, :], scale, mask=live & (groups < G)[None, :])
