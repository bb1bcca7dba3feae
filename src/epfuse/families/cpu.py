"""A CPU's family: torch's matrix products, one per expert that has rows.

What it costs is the products: rows of each expert lie together, everything between them happens on few rows at a time
while they are in the cache, and an expert's FP8 weights are dequantised when its rows come, into one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch

from epfuse.config import Activation, Bias, Path, WeightFormat
from epfuse.families.family import CallKind, Family, LayerCall, Reads, Steps
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.scratch import ScratchSize
from epfuse.stages.activation_library import activated_
from epfuse.stages.activation_reference import REFERENCES
from epfuse.stages.route.reference import local_experts, table_order
from epfuse.stages.tiles import ANY, GemmTile, LayerTiles, LibraryTile, TileRange
from epfuse.target import Target, multiplies
from epfuse.weights.dense import DENSE_DTYPES
from epfuse.weights.projections import Stack, expert_matrix

RUN = 64
"""Experts are taken together until they have so many rows."""
NATIVE_RUN = 1024
"""The same where all products are made in the activations' dtype: there the library takes many experts in one call."""
FEW_ADDED = 8
"""Rows that are added one by one: to wake torch's other threads for so few takes longer."""
WIDENS = 6
"""Rows from which it pays to widen an expert's BF16 or FP16 weights to FP32, where the CPU multiplies those alone."""
ALIGNED = 16
"""Bytes that torch's grouped product wants rows and matrices to begin at a multiple of."""
ALL = 2**31
"""More rows than a call can have."""


class Cpu(Family):
    """One step: for some experts at a time the rows are gathered, multiplied, activated, multiplied, weighted, added.

    It rounds as the kernels do or less often: where products are made in FP32, nothing is rounded before the sum.
    """

    name: ClassVar[str] = "cpu"
    tile: ClassVar[type[GemmTile]] = LibraryTile
    beside_fp8: ClassVar[frozenset[torch.dtype]] = frozenset(DENSE_DTYPES)
    biases: ClassVar[frozenset[Bias]] = frozenset(Bias)
    reads: ClassVar[Reads] = {
        Target.CPU: {
            Path.W8A16: (WeightFormat.MXFP8, WeightFormat.BLOCK_FP8),
            Path.BF16: (WeightFormat.DENSE,),
        }
    }

    def computes(self, activation: type[Activation]) -> bool:
        """Whatever the reference has."""
        return activation.kind in REFERENCES

    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """The library's."""
        run = NATIVE_RUN if kind.form is WeightFormat.DENSE and multiplies(kind.dtype) else RUN
        return (TileRange(ANY, LayerTiles.both(run, LibraryTile())),)

    def block_ms(self, rows: float) -> list[int]:
        """Nothing to search."""
        return [RUN]

    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Nothing to search."""
        return iter((LibraryTile(),))

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Always."""
        return isinstance(tile, LibraryTile)

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """None: torch allocates."""
        return ScratchSize(0, 0)

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """All in one."""
        return Steps(None, (("experts", partial(run_experts, call, tiles.block_m)),))


class ExpertRun(NamedTuple):
    """Experts one after another whose rows are worked on together.

    Attributes:
        first: the first expert.
        ends: of each, where its rows end, counted from the run's first row; some may have none.
    """

    first: int
    ends: list[int]

    @property
    def rows(self) -> int:
        """Of all its experts."""
        return self.ends[-1]


def runs_of(counts: list[int], least: int) -> Iterator[ExpertRun]:
    """Experts with ``counts`` rows, taken together until they have ``least``; a run begins with one that has rows."""
    first, ends = 0, [0]
    for expert, count in enumerate(counts):
        if not ends[-1]:
            first, ends = expert, []
        ends.append((ends[-1] if ends else 0) + count)
        if ends[-1] >= least:
            yield ExpertRun(first, ends)
            ends = [0]
    if ends[-1]:
        yield ExpertRun(first, ends)


def run_experts(call: LayerCall, least: int) -> None:
    """A whole call, into ``call.out``. Host syncs: none, everything is on the host.

    Args:
        call: on a CPU.
        least: rows of a run of experts.
    """
    # out may be made in inference mode, and then is written in it alone
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        slots = local_experts(call.topk_ids, call.slots)
        order = table_order(slots)
        counts = torch.bincount(slots[order], minlength=call.shape.local_experts).tolist()
        tokens = order // call.shape.top_k
        factors = call.topk_weights.reshape(-1)[order].unsqueeze(1)
        total = call.out if call.out.dtype == torch.float32 else torch.empty_like(call.out, dtype=torch.float32)
        total.zero_()
        first = Products(call.w13, call.hidden.dtype, call.gate_up_bias)
        second = Products(call.w2, call.hidden.dtype, call.down_bias)
        begin = 0
        for run in runs_of(counts, least):
            mine = slice(begin, begin + run.rows)
            begin += run.rows
            gate_up = first(call.hidden.index_select(0, tokens[mine]), run)
            rows = second(activated_(gate_up, call.activation), run)
            _add(total, tokens[mine], rows.mul_(factors[mine]))
        if total is not call.out:
            call.out.copy_(total)


def _add(total: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """Add each row to its token's, in their order."""
    if len(rows) > FEW_ADDED:
        total.index_add_(0, tokens, rows)
        return
    for token, row in zip(tokens.tolist(), rows.unbind(0), strict=True):
        total[token].add_(row)


class Products:
    """A stack of weights, to be multiplied beside activations in ``dtype``.

    Args:
        stack: ``[L, N, K]``.
        dtype: of the activations; products of few rows are made in it, or all where the CPU can.
        bias: ``[L, N]`` float32, added to the products in FP32; None for none.
    """

    def __init__(self, stack: Stack, dtype: torch.dtype, bias: torch.Tensor | None = None) -> None:
        self.stack: Stack = stack
        self.dtype: torch.dtype = dtype
        self.bias: torch.Tensor | None = bias
        self.widens: int = 0
        self.wide: torch.Tensor | None = None
        self.grouped: bool = False
        if isinstance(stack, torch.Tensor):
            self.widens = ALL if multiplies(dtype) else WIDENS
            row = stack.shape[2] * stack.element_size()
            self.grouped = row % ALIGNED == 0 and stack.data_ptr() % ALIGNED == 0
        elif isinstance(stack, MXFP8) and dtype == torch.bfloat16 and multiplies(dtype):
            self.widens = ALL  # E4M3 x 2^e is a BF16 number; block FP8's scales are any numbers, and FP16 is too narrow

    def __call__(self, x: torch.Tensor, run: ExpertRun) -> torch.Tensor:
        """``[n, K]``, the rows of a run, times each expert's matrix, its bias added -> ``[n, N]`` float32."""
        counts = [end - start for start, end in pairwise([0, *run.ends])]
        out = self._products(x, run, counts)
        if self.bias is not None:
            for expert, (count, end) in enumerate(zip(counts, run.ends, strict=True), run.first):
                out[end - count : end].add_(self.bias[expert])
        return out

    def _products(self, x: torch.Tensor, run: ExpertRun, counts: list[int]) -> torch.Tensor:
        """Of the rows of each expert of a run and its matrix."""
        few = run.rows < self.widens * sum(count > 0 for count in counts)
        if self.grouped and isinstance(self.stack, torch.Tensor) and few:
            stack = self.stack[run.first : run.first + len(counts)].transpose(1, 2)
            ends = torch.tensor(run.ends, dtype=torch.int32, device="cpu")
            return torch.nn.functional.grouped_mm(x.to(self.dtype), stack, offs=ends).float()
        out = x.new_empty(x.shape[0], self.stack.shape[1], dtype=torch.float32)
        for expert, (count, end) in enumerate(zip(counts, run.ends, strict=True), run.first):
            if not count:
                continue
            dtype = self.dtype if count < self.widens else torch.float32
            rows, into, matrix = x[end - count : end].to(dtype), out[end - count : end], self._matrix(expert, dtype)
            if dtype == torch.float32:
                torch.mm(rows, matrix.T, out=into)
            else:
                into.copy_(rows @ matrix.T)
        return out

    def _matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """``[N, K]`` of an expert; dense weights that are widened share one buffer, which the next one overwrites."""
        if not isinstance(self.stack, torch.Tensor):
            return expert_matrix(self.stack, expert, dtype)
        matrix = self.stack[expert]
        if matrix.dtype == dtype:
            return matrix
        if self.wide is None:
            self.wide = torch.empty_like(matrix, dtype=dtype)
        return self.wide.copy_(matrix)


CPU = Cpu()
