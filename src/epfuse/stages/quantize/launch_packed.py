"""Launch the kernel that packs rows and quantises them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from epfuse.config import Activation
from epfuse.stages.gather.launch import packing
from epfuse.stages.grid import power_of_two
from epfuse.stages.quantize.kernel_packed import quantize_packed_kernel
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.table import LoneTokens, RouteTable
from epfuse.target import Target, target_of

PROGRAMS_PER_UNIT = 6


class Bounds(NamedTuple):
    """What the scales of gate_up's results follow from, so that they are known before the results are.

    A row's results have a bound by its length and by the lengths of the weights' rows. E4M3 is as precise in one scale
    as in another, as long as nothing exceeds it and little falls below its normal numbers: a bound does for a maximum.

    Attributes:
        longest: ``[L, 2]`` float32: the lengths of each expert's longest gate row and longest up row (`RowFP8`).
        activation: between the GEMMs, a bounded SwiGLU-OAI; no bias comes before it.
        scales: ``[R, 1]`` uint8 E8M0, written for the rows of local routes, packed.
    """

    longest: torch.Tensor
    activation: Activation
    scales: torch.Tensor


def launch_quantize_packed(
    x: torch.Tensor,
    routes: RouteTable,
    top_k: int | None,
    out: FP8Rows | None = None,
    route_row: torch.Tensor | None = None,
    lone: LoneTokens | None = None,
    bounds: Bounds | None = None,
) -> FP8Rows:
    """Quantise the rows of the local routes to E4M3FN with one E8M0 scale a group, rounded up; packed.

    Row for row bitwise what `epfuse.stages.quantize.reference` gives with such groups.

    Args:
        x: contiguous bfloat16: ``[T, K]``, or ``[R, K]`` packed already.
        routes: RouteTable of this call; rows lie packed in its order.
        top_k: route r has row ``r // top_k`` of x; None if x lies packed.
        out: ``[R, K]``, in groups of a power of two or one group a row; only as many rows as there are local routes
            are written, the first ones. Rows of values may be a multiple of K apart. Allocated if None, with one group
            a row.
        route_row: as `launch_gather` takes it.
        lone: as `launch_gather` takes it; needs top_k.
        bounds: to have the scales of gate_up's results written; needs top_k and one group a row.

    Returns:
        ``out``.

    Host syncs: none; graph-capturable; bitwise repeatable.
    """
    size, device = x.shape[1], x.device
    if out is None:
        out = FP8Rows.empty(routes.num_routes, size, size, torch.float8_e4m3fn, device)
    grid, operands, options = packing(routes, top_k, size, device, PROGRAMS_PER_UNIT, route_row, lone)
    hardware = target_of(device) is Target.SM90  # the interpreter's conversion truncates
    options |= {"GROUP": power_of_two(out.group), "SPREAD": out.values.stride(0) // size, "HARDWARE": hardware}
    after: tuple[Any, ...] = (None, None, None, None)
    if bounds is not None:
        after = (bounds.scales, bounds.longest, routes.block_expert, bounds.activation.parameters)
    quantize_packed_kernel[grid](x, out.values.view(torch.uint8), out.scales, *operands, *after, **options)
    return out
