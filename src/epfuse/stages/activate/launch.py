"""Launch the activation of the FP8 paths."""

from __future__ import annotations

import torch

from epfuse.config import Activation
from epfuse.stages.activate.kernel import activate_kernel
from epfuse.stages.extent import extents
from epfuse.stages.grid import pieces, power_of_two
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import RouteTable
from epfuse.target import target_of

_ROWS = 4
_VALUES = 512  # of a row and a program: with 4 warps, 16 values of each half a lane


def launch_activate(gate_up: torch.Tensor, routes: RouteTable, activation: Activation, out: FP8Rows) -> FP8Rows:
    """The activation of the local rows, in FP32, quantised without a rounding in between.

    Args:
        gate_up: ``[R, 2I]`` contiguous; gate half, then up half, or ``[R, I]`` where the activation has no gate; only
            rows of local routes are read.
        routes: RouteTable of this call. The launch is sized from its bound; programs past its counter do nothing.
        activation: between the two GEMMs.
        out: ``[R, I]`` E4M3FN, or E4M3FNUZ for gfx94x, in groups of 32 for MXFP8 or 128 for block FP8; only rows of
            local routes are written.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    intermediate, group = gate_up.shape[1] // activation.inputs, out.group
    groups = pieces(intermediate, group)
    rows = min(_ROWS, routes.block_m)
    block = min(_VALUES // group, power_of_two(groups))
    codes = out.values.view(torch.uint8)  # bytes: all rounding is the kernel's own
    values, codes, scales = extents(target_of(gate_up.device), gate_up, codes, out.scales)
    activate_kernel[(pieces(routes.max_padded, rows), pieces(groups, block))](
        values,
        codes,
        scales,
        routes.sorted_routes,
        routes.num_padded,
        routes.num_routes,
        intermediate,
        groups,
        activation.parameters,
        ACTIVATION=activation.kind,
        INPUTS=activation.inputs,
        BLOCK_R=rows,
        BLOCK_G=block,
        GROUP=group,
        FNUZ=out.values.dtype == torch.float8_e4m3fnuz,
        num_warps=4,
    )
    return out
