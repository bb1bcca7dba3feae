"""What each kernel must write, from the stages' references in PyTorch, given what a launch was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from epfuse.aot.isa.errors import IsaError
from epfuse.aot.isa.recorded import Launched, Recorded
from epfuse.config import ACTIVATIONS, Activation
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.stages.activate.reference import activate
from epfuse.stages.combine.reference import combine
from epfuse.stages.down.reference import down
from epfuse.stages.gate_up.reference import gate_up
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.reference import local_experts, route
from epfuse.stages.route.table import RouteTable
from epfuse.weights.block_fp8 import BlockFP8
from epfuse.weights.projections import Stack, expert_matrix


@dataclass(frozen=True)
class Expected:
    """What an argument's tensor must hold afterwards.

    Attributes:
        values: of its shape and dtype; of no account where nothing is written.
        written: which elements are; the others must be as they were.
    """

    values: torch.Tensor
    written: torch.Tensor


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not what it must be.

    Attributes:
        kernel, argument: which.
        wrong: elements with another value.
        missing: elements that nothing wrote.
        stray: elements that were written and must not be.
        first: index of the first of them, what was found there and what was expected.
    """

    kernel: str
    argument: str
    wrong: int
    missing: int
    stray: int
    first: str

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.argument} has {self.wrong} wrong, {self.missing} missing, {self.stray} stray"
            f" elements (first {self.first})"
        )


def mismatches(launched: Launched) -> list[Mismatch]:
    """Where a launch's tensors differ from what they must be: by value, bit for bit but for the sign of zero.

    Raises:
        IsaError: there is no reference for the kernel.
    """
    recorded = launched.recorded
    return compare(launched, expected(recorded))


def expected(recorded: Recorded) -> dict[str, Expected]:
    """What each tensor that the launch writes must hold afterwards."""
    reference = REFERENCES.get(recorded.program.name)
    if reference is None:
        raise IsaError(f"{recorded.program.name} has no reference; one of {', '.join(REFERENCES)} has")
    return reference(recorded)


def compare(launched: Launched, wanted: dict[str, Expected], *, whole: bool = True) -> list[Mismatch]:
    """`mismatches` with the expectation at hand; of a launch that is not ``whole``, what is missing may come yet."""
    recorded, found = launched.recorded, []
    for name, want in wanted.items():
        values, defined = launched.tensor(name)
        before, known = recorded.tensor(name), recorded.defined(name)
        missing = want.written & ~defined & whole
        wrong = want.written & defined & ~same(values, want.values)
        stray = ~want.written & ((defined != known) | (_bits(values) != _bits(before)))
        bad = missing | wrong | stray
        if bool(bad.any()):
            first = tuple(int(place) for place in bad.nonzero()[0])
            words = f"{list(first)}: {values[first].item()}, must be {want.values[first].item()}"
            found.append(
                Mismatch(recorded.program.name, name, int(wrong.sum()), int(missing.sum()), int(stray.sum()), words)
            )
    for name, value in recorded.arguments.items():
        if isinstance(value, torch.Tensor) and name not in wanted and value.numel():
            values, before = launched.tensor(name)[0], recorded.tensor(name)
            stray = _bits(values) != _bits(before)
            if bool(stray.any()):
                first = tuple(int(place) for place in stray.nonzero()[0])
                found.append(Mismatch(recorded.program.name, name, 0, 0, int(stray.sum()), f"{list(first)}, an input"))
    return found


def same(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where two tensors are equal, NaN to NaN."""
    if not values.dtype.is_floating_point:
        return values == wanted
    values, wanted = values.double(), wanted.double()
    return (values == wanted) | (values.isnan() & wanted.isnan())


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _activation(recorded: Recorded) -> Activation:
    [kind] = [kind for kind in ACTIVATIONS if kind.kind == recorded.arguments["ACTIVATION"]]
    return kind(*recorded.arguments["activation"])


def _bias(recorded: Recorded) -> torch.Tensor | None:
    return None if recorded.arguments["bias"] is None else recorded.tensor("bias")


def _table(recorded: Recorded) -> RouteTable:
    """The route table that a GEMM was given."""
    blocks = recorded.tensor("block_expert") if "block_expert" in recorded.arguments else torch.empty(0)
    slots, used = recorded.tensor("sorted_routes"), recorded.tensor("num_padded")
    arguments = recorded.arguments
    block_m = arguments.get("BLOCK_M") or 1
    return RouteTable(slots, blocks, blocks, used, arguments["R"], block_m)


def _live(recorded: Recorded) -> torch.Tensor:
    """The local routes of a table, ascending."""
    table = _table(recorded)
    slots = table.sorted_routes[: int(table.num_padded)].long()
    return slots[slots < table.num_routes].sort().values


def _rows(values: torch.Tensor, live: torch.Tensor) -> Expected:
    written = torch.zeros(values.shape, dtype=torch.bool)
    written[live] = True
    return Expected(values, written)


def _all(values: torch.Tensor) -> Expected:
    return Expected(values, torch.ones(values.shape, dtype=torch.bool))


def _weights(recorded: Recorded, name: str) -> Stack:
    values = recorded.tensor(name)
    if recorded.arguments[f"{name}_scale"] is None:
        return values
    scales = recorded.tensor(f"{name}_scale")
    return BlockFP8(values, scales) if scales.dtype == torch.float32 else MXFP8(values, scales)


def _route(recorded: Recorded) -> dict[str, Expected]:
    arguments = recorded.arguments
    table = route(
        recorded.tensor("topk_ids"), recorded.tensor("expert_map"), arguments["L"], block_m := arguments["BLOCK_M"]
    )
    used = int(table.num_padded)

    def first(values: torch.Tensor, count: int) -> Expected:
        return Expected(values, torch.arange(values.numel()) < count)

    return {
        "sorted_routes": first(table.sorted_routes, used),
        "block_expert": first(table.block_expert, used // block_m),
        "block_row": first(table.block_row, used // block_m),
        "num_padded": _all(table.num_padded),
    }


def _count(recorded: Recorded) -> dict[str, Expected]:
    arguments = recorded.arguments
    local, bins, chunk = arguments["L"], arguments["BINS"], arguments["CHUNK"]
    slots = local_experts(recorded.tensor("topk_ids"), recorded.tensor("expert_map"))
    slots = torch.where(slots < 0, local, slots)
    chunks = -(-slots.numel() // chunk)
    padded = torch.full((chunks * chunk,), local)  # a program's slots past the last route are no expert's either
    padded[: slots.numel()] = slots
    counts = torch.stack([torch.bincount(part, minlength=bins) for part in padded.view(chunks, chunk)])
    return {"counts": _all(counts.int())}


def _quantize(recorded: Recorded) -> dict[str, Expected]:
    rows = quantize(recorded.tensor("x"), **_format(recorded))
    return {"codes": _all(rows.values.view(torch.uint8)), "scales": _all(rows.scales)}


def _format(recorded: Recorded) -> dict[str, Any]:
    dtype = torch.float8_e4m3fnuz if recorded.arguments["FNUZ"] else torch.float8_e4m3fn
    return {"group": recorded.arguments["GROUP"], "dtype": dtype}


def _gate_up(recorded: Recorded) -> dict[str, Expected]:
    weights, top_k = _weights(recorded, "w13"), recorded.arguments["K"]
    call = recorded.tensor("x"), weights, _table(recorded), top_k, _activation(recorded)
    values = gate_up(*call, bias=_bias(recorded))
    return {"out": _rows(values, _live(recorded))}


def _gate_up_fp8(recorded: Recorded) -> dict[str, Expected]:
    rows = FP8Rows(recorded.tensor("x"), recorded.tensor("x_scale"), recorded.arguments["GROUP"]).dequantize()
    weights, bias, out = _weights(recorded, "w13"), _bias(recorded), torch.zeros_like(recorded.tensor("out"))
    for expert, routes in _table(recorded).groups():
        product = rows[routes // recorded.arguments["K"]] @ expert_matrix(weights, expert, torch.float32).T
        if bias is not None:
            product += bias[expert]
        out[routes] = product.to(out.dtype)
    return {"out": _rows(out, _live(recorded))}


def _activate(recorded: Recorded) -> dict[str, Expected]:
    live = _live(recorded)
    source = recorded.tensor("gate_up").index_fill(0, _others(recorded, live), 0)
    rows = activate(source, _activation(recorded), **_format(recorded))
    return {"codes": _rows(rows.values.view(torch.uint8), live), "scales": _rows(rows.scales, live)}


def _others(recorded: Recorded, live: torch.Tensor) -> torch.Tensor:
    remote = torch.ones(recorded.arguments["R"], dtype=torch.bool)
    remote[live] = False
    return remote.nonzero().squeeze(1)


def _down(recorded: Recorded) -> dict[str, Expected]:
    call = recorded.tensor("y"), _weights(recorded, "w2"), _table(recorded), recorded.tensor("topk_weights")
    values = down(*call, bias=_bias(recorded))
    return {"out": _rows(values, _live(recorded))}


def _down_fp8(recorded: Recorded) -> dict[str, Expected]:
    arguments, table = recorded.arguments, _table(recorded)
    live = _live(recorded)
    routed = FP8Rows(recorded.tensor("y"), recorded.tensor("y_scale"), arguments["GROUP"])
    rows = routed.dequantize().index_fill(0, _others(recorded, live), 0)
    weights, bias, out = _weights(recorded, "w2"), _bias(recorded), recorded.tensor("out")
    factors = recorded.tensor("topk_weights").reshape(-1, 1)
    for expert, routes in table.groups():
        product = rows[routes] @ expert_matrix(weights, expert, torch.float32).T
        if bias is not None:
            product += bias[expert]
        product *= factors[routes]
        if arguments["ATOMIC"]:
            out.index_add_(0, routes // arguments["K"], product)
        else:
            out[routes] = product.to(out.dtype)
    return {"out": _rows(out, live // arguments["K"] if arguments["ATOMIC"] else live)}


def _combine(recorded: Recorded) -> dict[str, Expected]:
    routed = recorded.tensor("routed")
    return {"out": _all(combine(routed, recorded.tensor("topk_ids"), recorded.tensor("expert_map"), routed.dtype))}


REFERENCES: dict[str, Callable[[Recorded], dict[str, Expected]]] = {
    "route_kernel": _route,
    "count_kernel": _count,
    "place_kernel": _route,
    "quantize_kernel": _quantize,
    "gate_up_kernel": _gate_up,
    "gate_up_fp8_kernel": _gate_up_fp8,
    "activate_kernel": _activate,
    "down_kernel": _down,
    "down_fp8_kernel": _down_fp8,
    "combine_kernel": _combine,
}
"""Kernel -> what it must write."""
