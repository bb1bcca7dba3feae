"""A CPU's family: torch's matrix products, one per expert that has rows.

What it costs is the products: rows of each expert lie together, everything between them happens on few rows at a time
while they are in the cache, and an expert's FP8 weights are dequantised when its rows come, into one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain
from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import grouped_mm, linear

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
FEW_EXPERTS = 1024
"""E up to which a whole map becomes a list for a few look-ups."""
FEW_ROUTES = 256
"""Routes that Python sorts sooner than a dozen calls of torch's."""
FEW_ADDED = 8
"""Rows that are added one by one: to wake torch's other threads for so few takes longer."""
DENSE_RUN = 0.5
"""Of the experts from a run's first to its last, how many must have rows for a grouped product."""
WIDENS = 6
"""Rows from which it pays to widen an expert's BF16 or FP16 weights to FP32, where the CPU multiplies those alone."""
ALIGNED = 16
"""Bytes that torch's grouped product wants rows and matrices to begin at a multiple of."""
PIECE = 128
"""Rows of 16 bits that are widened to FP32 at once."""
ALL = 2**31
"""More rows than a call can have."""


class Cpu(Family):
    """experts, in which rows of some experts at a time are gathered, multiplied, activated, multiplied, and added.

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


class ExpertRows(NamedTuple):
    """One expert and how many rows it has, at least one."""

    expert: int
    rows: int


def runs_of(held: list[ExpertRows], least: int) -> Iterator[list[ExpertRows]]:
    """Experts, in their order, taken together until they have ``least`` rows."""
    run, rows = list[ExpertRows](), 0
    for one in held:
        run.append(one)
        rows += one.rows
        if rows >= least:
            yield run
            run, rows = [], 0
    if run:
        yield run


def run_experts(call: LayerCall, least: int) -> None:
    """A whole call, into ``call.out``. Host syncs: none, everything is on the host.

    Args:
        call: on a CPU.
        least: rows of a run of experts.
    """
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return run_experts(call, least)
    # out may be made in inference mode, and then is written in it alone
    with torch.inference_mode():
        first = Products(call.w13, call.hidden.dtype, call.gate_up_bias)
        second = Products(call.w2, call.hidden.dtype, call.down_bias)
        if call.hidden.shape[0] == 1:
            call.out.copy_(_sum_of_token(call, first, second))
            return
        total = call.out if call.out.dtype == torch.float32 else torch.empty_like(call.out, dtype=torch.float32)
        total.zero_()
        held, order, tokens = _few_routes(call) if call.routes <= FEW_ROUTES else _many_routes(call)
        factors = call.topk_weights.view(-1, 1).index_select(0, order)
        begin = 0
        for run in runs_of(held, least):
            mine = slice(begin, begin + sum(one.rows for one in run))
            begin = mine.stop
            hidden = call.hidden.index_select(0, tokens[mine])
            if first.narrow(run) and second.narrow(run):
                rows = _narrow_rows(hidden, first, second, run, call.activation)
            else:
                rows = second(activated_(first(hidden, run), call.activation), run)
            for piece in zip(*map(_pieces, (tokens[mine], rows, factors[mine])), strict=True):
                _add(total, *piece)
        if total is not call.out:
            call.out.copy_(total)


class LocalRoutes(NamedTuple):
    """The routes of a call whose experts are local, grouped by expert, ascending within one.

    Attributes:
        held: the experts that have any.
        order: ``[n]`` int64, the routes.
        tokens: ``[n]`` int64, theirs.
    """

    held: list[ExpertRows]
    order: torch.Tensor
    tokens: torch.Tensor


def _many_routes(call: LayerCall) -> LocalRoutes:
    slots = local_experts(call.topk_ids, call.slots)
    order = table_order(slots)
    counts = enumerate(torch.bincount(slots[order]).tolist())
    held = [ExpertRows(expert, count) for expert, count in counts if count]
    return LocalRoutes(held, order, order // call.shape.top_k)


def _few_routes(call: LayerCall) -> LocalRoutes:
    """The same, looked at in Python."""
    routes_of: dict[int, list[int]] = {}
    for route, slot in enumerate(_slots_of(call)):
        if slot >= 0:
            routes_of.setdefault(slot, []).append(route)
    mine = sorted(routes_of.items())
    order = torch.tensor(list(chain.from_iterable(routes for _, routes in mine)), dtype=torch.int64, device="cpu")
    return LocalRoutes([ExpertRows(slot, len(routes)) for slot, routes in mine], order, order // call.shape.top_k)


def _slots_of(call: LayerCall) -> list[int]:
    """The local slot of each route, -1 where it has none."""
    of = call.slots.tolist() if call.slots.numel() <= FEW_EXPERTS else call.slots
    ids = call.topk_ids.view(-1).tolist()
    return [int(of[expert]) if 0 <= expert < len(of) else -1 for expert in ids]


def _sum_of_token(call: LayerCall, first: Products, second: Products) -> torch.Tensor:
    """A call's only token: ``[1, H]`` float32. Its routes need no order."""
    slots = _slots_of(call)
    local = [route for route, slot in enumerate(slots) if slot >= 0]
    if not local:
        return torch.zeros_like(call.out, dtype=torch.float32)
    run = [ExpertRows(slots[route], 1) for route in local]
    gate_up = first.one_by_one(call.hidden.repeat(len(run), 1), run)
    rows = second.one_by_one(activated_(gate_up, call.activation), run)
    factors = call.topk_weights if len(local) == len(slots) else call.topk_weights[:, local]
    return rows.mul_(factors.T).sum(0, keepdim=True)


def ends_of(run: list[ExpertRows]) -> torch.Tensor:
    """Where the rows of each expert end, from the run's first to its last: int32, as torch's grouped product wants."""
    first, past = run[0].expert, run[-1].expert + 1
    counts = [0] * (past - first)
    for expert, rows in run:
        counts[expert - first] = rows
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device="cpu")


def _narrow_rows(
    hidden: torch.Tensor, first: Products, second: Products, run: list[ExpertRows], activation: Activation
) -> torch.Tensor:
    """Of a run whose products are made in the activations' dtype: what is FP32 between them is made in pieces.

    A piece stays in the caches, and malloc does not give its memory back to the system after each call.
    """
    ends = ends_of(run)
    gate_up = first.grouped_product(hidden, run, ends)
    y = [activated_(rows.float(), activation).to(gate_up.dtype) for rows in _pieces(gate_up)]
    return second.grouped_product(torch.cat(y) if len(y) > 1 else y[0], run, ends)


def _pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (rows,) if len(rows) <= PIECE else torch.split(rows, PIECE)


def _add(total: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor) -> None:
    """Add each row, times its factor, to its token's, in their order."""
    rows = rows.float().mul_(factors)
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

    def __call__(self, x: torch.Tensor, run: list[ExpertRows]) -> torch.Tensor:
        """``[n, K]``, the rows of a run, times each expert's matrix, its bias added -> ``[n, N]`` float32."""
        if self.groups(run):
            return self._with_bias(self.grouped_product(x, run, ends_of(run)).float(), run)
        return self.one_by_one(x, run)

    def groups(self, run: list[ExpertRows]) -> bool:
        """Whether one call of torch's multiplies all experts of a run; it takes its time for one without rows, too."""
        few = sum(one.rows for one in run) < self.widens * len(run)
        return self.grouped and few and DENSE_RUN * (run[-1].expert + 1 - run[0].expert) <= len(run)

    def narrow(self, run: list[ExpertRows]) -> bool:
        """Whether that call's products are in a dtype of 16 bits, and nothing is added to them in FP32."""
        return self.dtype != torch.float32 and self.bias is None and self.groups(run)

    def one_by_one(self, x: torch.Tensor, run: list[ExpertRows]) -> torch.Tensor:
        """The same in one call of torch's for each entry of ``run``, whose experts may come in any order, and again."""
        return self._with_bias(self._one_by_one(x, run), run)

    def _with_bias(self, out: torch.Tensor, run: list[ExpertRows]) -> torch.Tensor:
        if self.bias is not None:
            parts = torch.split_with_sizes(out, [one.rows for one in run])
            for (expert, _), rows in zip(run, parts, strict=True):
                rows.add_(self.bias[expert])
        return out

    def grouped_product(self, x: torch.Tensor, run: list[ExpertRows], ends: torch.Tensor) -> torch.Tensor:
        """``[n, N]`` in the activations' dtype, without the bias, in one call of torch's; ``ends`` as `ends_of`."""
        assert isinstance(self.stack, torch.Tensor)
        stack = self.stack[run[0].expert : run[-1].expert + 1].transpose(1, 2)
        return grouped_mm(x.to(self.dtype), stack, offs=ends)

    def _one_by_one(self, x: torch.Tensor, run: list[ExpertRows]) -> torch.Tensor:
        """Without the bias."""
        counts = [one.rows for one in run]
        if max(counts) < self.widens:
            parts = torch.split_with_sizes(x.to(self.dtype), counts)  # Tensor.split takes four times as long
            products = [
                linear(rows, self._matrix(one.expert, self.dtype)) for one, rows in zip(run, parts, strict=True)
            ]
            return torch.cat(products).float()
        out = x.new_empty(x.shape[0], self.stack.shape[1], dtype=torch.float32)
        pairs = (torch.split_with_sizes(rows, counts) for rows in (x.float(), out))
        for (expert, count), rows, into in zip(run, *pairs, strict=True):
            if count < self.widens:
                into.copy_(linear(rows.to(self.dtype), self._matrix(expert, self.dtype)))
            else:
                torch.mm(rows, self._matrix(expert, torch.float32).T, out=into)
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
