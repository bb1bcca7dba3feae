"""A GEMM's code at the edges of its operands: loops that end in any step, part of a column tile, NaN behind rows.

In a layer a GEMM has one K and one N, and behind a row lies one like it: what a mask lets through too much may change
nothing. Here a layer's launch runs again on other sizes, and on rows of which every second one begins with NaN. What
lies behind the others must then be left out, or spoils them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.aot.isa.device import executing
from epfuse.aot.isa.expected import Expected
from epfuse.aot.isa.layers import Exact
from epfuse.aot.isa.recorded import Launched, Recorded
from epfuse.api import fused_experts
from epfuse.target import Target

TARGET = Target.GFX942
STEPS = {"even": 384, "masked": 320}
"""K of a layer's GEMM: three steps, so that the pipelined loop runs too, without a tail and with one."""
FEWER = {"even": (256, 128), "masked": (256, 192, 96, 32)}
"""Smaller K for the same code: the loop ends in its second step and in its first. With a tail it also ends without one,
so that the last products count, and in the first of the groups of columns that FP8 rows are multiplied in."""
NARROW = 64
"""Outputs of a layer's GEMM: few workgroups."""
WIDER = 80
"""Outputs beside `FEWER`: more than a tile of columns, of which the last has a part."""
TRAPS = {torch.float8_e4m3fnuz: 0x80, torch.uint8: 0xFF}
"""NaN in FP8, and as a byte of scales."""


@dataclass(frozen=True)
class Gemm:
    """One of a layer's two GEMMs.

    Attributes:
        kernel: its name.
        exact: the layer that launches it; K is one of `STEPS`, N is `NARROW`.
        fewer: smaller K for the same code.
    """

    kernel: str
    exact: Exact
    fewer: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel and its way."""
        return f"{self.kernel} {self.exact.name}"

    def launches(self) -> list[Recorded]:
        """The layer's launch, and the same code at the edges; no call makes the last one, without a column."""
        own = launch_of(self.kernel, self.exact).recorded
        some = [own, *(_sized(own, columns, WIDER) for columns in self.fewer)]
        return [own, *map(_trapped, some), _sized(own, 0, NARROW)]


def launch_of(kernel: str, exact: Exact) -> Launched:
    """The launch of a kernel in a layer."""
    operands = exact.hidden(), exact.weights(0), exact.topk_weights(), exact.topk_ids(), exact.expert_map(0)
    with executing(TARGET) as session:
        fused_experts(*operands, activation=exact.activation, path=exact.path, combine=exact.combine)
    [launched] = [launch for launch in session.launches if launch.recorded.program.name == kernel]
    return launched


def _operands(recorded: Recorded) -> tuple[str, str]:
    """Names of the rows and of the weights."""
    return ("x", "w13") if "w13" in recorded.arguments else ("y", "w2")


def _sized(recorded: Recorded, columns: int, outputs: int) -> Recorded:
    """The launch of K columns and another N, on numbers that are the launch's own."""
    arguments = recorded.arguments
    rows, weights = _operands(recorded)
    k, n = ("H", "I") if rows == "x" else ("I", "H")
    groups = -(-columns // arguments.get("GROUP", 32))
    before, after = (arguments.get("INPUTS", 1) * size for size in (arguments[n], outputs))
    wanted = {
        rows: (None, columns),
        f"{rows}_scale": (None, groups),
        weights: (after, columns),
        f"{weights}_scale": (-(-after // arguments.get("SCALE_ROWS", 1)), groups),
        "out": (None, arguments["out"].shape[1] * outputs // arguments[n]),
    }
    tensors = {
        name: (_cut(recorded.tensor(name), *size), _cut(recorded.defined(name), *size))
        for name, size in wanted.items()
        if arguments.get(name) is not None
    }
    x, y, z = recorded.grid
    old, new = (-(-size // arguments["BLOCK_N"]) for size in (before, after))
    sizes = {k: columns, n: outputs} | ({"G": groups} if "G" in arguments else {})
    return recorded.given(tensors, sizes, (x // old * new, y, z))


def _cut(tensor: torch.Tensor, height: int | None, width: int) -> torch.Tensor:
    """The first rows and columns of each matrix; where it has fewer, some are there twice in a row."""
    codes = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    for dim, size in ((-2, height), (-1, width)):
        if size is not None:
            codes = codes.index_select(dim, torch.arange(size) * codes.shape[dim] // max(size, codes.shape[dim]))
    return codes.view(tensor.dtype)


def _trapped(recorded: Recorded) -> Recorded:
    """The launch with NaN at the beginning of every second row of each operand, and so at each one's first address.

    Not of E4M3FN: Triton's own conversion for gfx942 makes a number of its NaN.
    """
    arguments, tensors = recorded.arguments, {}
    rows, weights = _operands(recorded)
    for name in (rows, f"{rows}_scale", weights, f"{weights}_scale"):
        if arguments.get(name) is not None:
            values = recorded.tensor(name).contiguous()
            # rows of a token that are summed in place: of every second token, or every sum would be NaN
            together = arguments["K"] if name.startswith("y") and arguments.get("ATOMIC") else 1
            # scales of a block: the first of the first expert, which has most of the routes, are numbers
            first = int(name == f"{weights}_scale" and arguments.get("SCALE_ROWS", 1) > 1)
            chosen = _every_second(values.shape, together, first)
            if values.dtype in TRAPS:
                values.view(torch.uint8).view(-1, values.shape[-1])[chosen, 0] = TRAPS[values.dtype]
            elif values.dtype != torch.float8_e4m3fn:
                values.view(-1, values.shape[-1])[chosen, 0] = torch.nan
            tensors[name] = values, recorded.defined(name)
    return recorded.given(tensors, {}, recorded.grid)


def _every_second(shape: torch.Size, together: int, first: int) -> torch.Tensor:
    """Every second row of matrices, from ``first`` on, and the others in every second pair of experts.

    So an output that is NaN with one expert is a number with another: experts 0, 2 and the last have routes.
    """
    row = torch.arange(shape[:-1].numel())
    expert, place = row // shape[-2], row % shape[-2] // together
    turn = expert if shape[-2] == 1 else expert // 2
    return (place + turn) % 2 == first


def unseen(wanted: Expected) -> int:
    """Pairs of neighbouring columns of what a launch must write that are NaN in every row: nothing shows a fault there.

    One of two neighbours may be: every second row of the weights has a NaN.
    """
    numbers = (wanted.values.isfinite() & wanted.written).any(0)
    return int((~numbers.view(-1, 2).any(1)).sum())
