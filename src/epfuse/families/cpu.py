"""A CPU's family: torch's matrix products, one per expert that has rows.

What it costs is the products: rows of each expert lie together, everything between them happens on few rows at a time
while they are in the cache, and an expert's FP8 weights are dequantised when its rows come, into one buffer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
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
"""Routes that Python sorts sooner than a dozen calls of torch's, and whose rows, in FP32, stay in the caches."""
FEW_ADDED = 8
"""Rows that are added one by one: to wake torch's other threads for so few takes longer."""
DENSE_RUN = 0.5
"""Of the experts from a run's first to its last, how many must have rows for a grouped product."""
WIDENS = 6
"""Rows from which it pays to widen an expert's BF16 or FP16 weights to FP32, where the CPU multiplies those alone."""
ALIGNED = 16
"""Bytes that torch's grouped product wants rows and matrices to begin at a multiple of."""
PIECE = 256
"""Rows of 16 bits that are widened to FP32 at once: to wake another thread for fewer takes as long as it helps."""
AT_ONCE = 2**22
"""Numbers in all rows of a call, up to which one call of torch's adds them: 16 MiB when they are FP32. From that block
on the C library keeps that much and twice as much for the next call, and new memory costs up to a fifth of a call."""
FEW_ROWS = 3
"""Rows of an expert up to which the library takes less time for an FP32 matrix times them than for them times it."""
LONG_ROW = 4096
"""Numbers in a matrix's rows from which on that is no longer so."""
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
    if torch.is_grad_enabled() or (call.out.is_inference() and not torch.is_inference_mode_enabled()):
        with torch.inference_mode():
            return run_experts(call, least)
    first = Products(call.w13, call.hidden.dtype, call.gate_up_bias)
    second = Products(call.w2, call.hidden.dtype, call.down_bias)
    if call.hidden.shape[0] == 1:
        _one_token(call, first, second)
    elif call.routes <= FEW_ROUTES:
        _few_routes(call, first, second, least)
    else:
        _many_routes(call, first, second, least)


def _many_routes(call: LayerCall, first: Products, second: Products, least: int) -> None:
    """All rows in one run, if they are few enough and the library multiplies them so, in 16 bits.

    Else each run's rows are added before the next run is multiplied.
    """
    held, order = _sorted_routes(call)
    tokens = order // call.shape.top_k
    if held and order.numel() * call.hidden.shape[1] <= AT_ONCE and first.narrow(held) and second.narrow(held):
        rows = _layer(call.hidden.index_select(0, tokens), first, second, held, call.activation)
        _weigh_and_add(call, rows, order)
        return
    total = call.out if call.out.dtype == torch.float32 else torch.empty_like(call.out, dtype=torch.float32)
    total.zero_()
    factors = call.topk_weights.view(-1, 1).index_select(0, order)
    begin = 0
    for run in runs_of(held, least):
        mine = slice(begin, begin + sum(one.rows for one in run))
        begin = mine.stop
        rows = _layer(call.hidden.index_select(0, tokens[mine]), first, second, run, call.activation)
        for piece in zip(*map(_pieces, (tokens[mine], rows, factors[mine])), strict=True):
            _add(total, *piece)
    if total is not call.out:
        call.out.copy_(total)


def _weigh_and_add(call: LayerCall, rows: torch.Tensor, order: torch.Tensor) -> None:
    """``rows [n, H]`` of the routes ``order [n]`` into ``call.out``; each token's in the order of its routes."""
    tokens, top_k = call.topk_ids.shape
    cpu = torch.device("cpu")  # by default tensors may be made elsewhere
    places = torch.empty(tokens * top_k, dtype=torch.int64, device=cpu)
    places[order] = torch.arange(order.numel(), device=cpu)
    factors = call.topk_weights.view(-1)
    if order.numel() == places.numel():
        bags = torch.arange(0, places.numel(), top_k, device=cpu)
    else:
        local = torch.zeros_like(places, dtype=torch.bool).index_fill_(0, order, True)
        places, factors, counts = places[local], factors[local], local.view(tokens, top_k).sum(1)
        bags = counts.cumsum(0).sub_(counts)
    call.out.copy_(torch.embedding_bag(rows.float(), places, bags, False, 0, False, factors)[0])


def _sorted_routes(call: LayerCall) -> tuple[list[ExpertRows], torch.Tensor]:
    """The local experts that have rows, and the routes, ``[n]`` int64: grouped by expert, ascending within one."""
    slots = local_experts(call.topk_ids, call.slots)
    order = table_order(slots)
    counts = enumerate(torch.bincount(slots[order]).tolist())
    return [ExpertRows(expert, count) for expert, count in counts if count], order


def _few_routes(call: LayerCall, first: Products, second: Products, least: int) -> None:
    """The same with as few calls of torch's as it takes: between products whose weights fill the caches, each is cold.

    The routes are sorted in Python, and one call weighs and adds all rows, each token's in the order of its routes.
    """
    tokens, top_k = call.topk_ids.shape
    slots = _slots_of(call)
    local = [route for route, slot in enumerate(slots) if slot >= 0]
    if not local:
        call.out.zero_()
        return
    order = sorted(local, key=slots.__getitem__)
    counts = [0] * (slots[order[-1]] + 1)
    for route in local:
        counts[slots[route]] += 1
    held = [ExpertRows(slot, rows) for slot, rows in enumerate(counts) if rows]
    places = [0] * len(slots)
    for place, route in enumerate(order):
        places[route] = place
    sources = [route // top_k for route in order]
    whole = len(local) == len(slots)
    rows_of = places if whole else [places[route] for route in local]
    indices = _int32([*sources, *rows_of, *_firsts(local, tokens, top_k)])
    into, back, bags = torch.split_with_sizes(indices, [len(order), len(order), tokens])
    factors = call.topk_weights.view(-1) if whole else call.topk_weights.view(-1).index_select(0, _int32(local))
    hidden = call.hidden.index_select(0, into)
    if len(order) <= least:
        rows = _layer(hidden, first, second, held, call.activation)
    else:
        runs = list(runs_of(held, least))
        parts = torch.split_with_sizes(hidden, [sum(one.rows for one in run) for run in runs])
        done = (_layer(part, first, second, run, call.activation) for part, run in zip(parts, runs, strict=True))
        rows = torch.cat([part.float() for part in done])
    call.out.copy_(torch.embedding_bag(rows.float(), back, bags, False, 0, False, factors)[0])


def _firsts(local: list[int], tokens: int, top_k: int) -> Sequence[int]:
    """Where in ``local``, ascending routes, each token's begin."""
    if len(local) == tokens * top_k:
        return range(0, len(local), top_k)
    counts = [0] * tokens
    for route in local:
        counts[route // top_k] += 1
    return list(accumulate(counts[:-1], initial=0))


def _int32(numbers: Sequence[int]) -> torch.Tensor:
    """``[n]`` int32 of at least one number, in a third of the time of torch.tensor."""
    return torch.frombuffer(array("i", numbers), dtype=torch.int32)


def _layer(
    hidden: torch.Tensor, first: Products, second: Products, run: list[ExpertRows], activation: Activation
) -> torch.Tensor:
    """``[n, H]``, the rows of a run, through both of its products -> ``[n, H]``, FP32 or as the products are."""
    if first.narrow(run) and second.narrow(run):
        return _narrow_rows(hidden, first, second, run, activation)
    return second(activated_(first(hidden, run), activation), run)


def _slots_of(call: LayerCall) -> list[int]:
    """The local slot of each route, -1 where it has none."""
    ids, experts = call.topk_ids.view(-1).tolist(), call.slots.numel()
    if experts <= FEW_EXPERTS:
        slots = call.slots.tolist()
        return [slots[expert] if 0 <= expert < experts else -1 for expert in ids]
    of = call.slots
    return [int(of[expert]) if 0 <= expert < len(of) else -1 for expert in ids]


def _one_token(call: LayerCall, first: Products, second: Products) -> None:
    """A call's only token. Its routes need no order."""
    slots = _slots_of(call)
    local = [route for route, slot in enumerate(slots) if slot >= 0]
    if not local:
        call.out.zero_()
        return
    run = [ExpertRows(slots[route], 1) for route in local]
    gate_up = first.one_by_one([call.hidden] * len(run), run)
    rows = second.one_by_one(torch.split(activated_(gate_up, call.activation), 1), run)
    factors = call.topk_weights if len(local) == len(slots) else call.topk_weights[:, local]
    call.out.copy_(torch.mm(factors, rows))


def ends_of(run: list[ExpertRows]) -> torch.Tensor:
    """Where the rows of each expert end, from the run's first to its last: int32, as torch's grouped product wants."""
    first, past = run[0].expert, run[-1].expert + 1
    counts = [0] * (past - first)
    for expert, rows in run:
        counts[expert - first] = rows
    return _int32(list(accumulate(counts)))


def _narrow_rows(
    hidden: torch.Tensor, first: Products, second: Products, run: list[ExpertRows], activation: Activation
) -> torch.Tensor:
    """Of a run whose products are made in the activations' dtype: what is FP32 between them is made in pieces.

    A piece stays in the caches, and what it becomes goes to where its first numbers were, which are in them, too.
    """
    ends = ends_of(run)
    gate_up = first.grouped_product(hidden, run, ends)
    y = gate_up.narrow(1, 0, second.stack.shape[2])
    if gate_up.shape[0] <= PIECE:
        y.copy_(activated_(gate_up, activation))
    else:
        for before, after in zip(torch.split(gate_up, PIECE), torch.split(y, PIECE), strict=True):
            after.copy_(activated_(before, activation))
    return second.grouped_product(y, run, ends)


def _pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (rows,) if rows.shape[0] <= PIECE else torch.split(rows, PIECE)


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
        if isinstance(stack, torch.Tensor):
            self.widens = ALL if multiplies(dtype) else WIDENS
        elif isinstance(stack, MXFP8) and dtype == torch.bfloat16 and multiplies(dtype):
            self.widens = ALL  # E4M3 x 2^e is a BF16 number; block FP8's scales are any numbers, and FP16 is too narrow

    def __call__(self, x: torch.Tensor, run: list[ExpertRows]) -> torch.Tensor:
        """``[n, K]``, the rows of a run, times each expert's matrix, its bias added -> ``[n, N]`` float32."""
        if self.groups(run):
            return self._with_bias(self.grouped_product(x, run, ends_of(run)).float(), run)
        return self.one_by_one(torch.split_with_sizes(x, [one.rows for one in run]), run)

    def groups(self, run: list[ExpertRows]) -> bool:
        """Whether one call of torch's multiplies all experts of a run; it takes its time for one without rows, too."""
        if not isinstance(self.stack, torch.Tensor) or DENSE_RUN * (run[-1].expert + 1 - run[0].expert) > len(run):
            return False
        rows, row = sum(one.rows for one in run), self.stack.shape[2]
        if rows >= self.widens * len(run):
            return False
        if self.dtype == torch.float32 and rows <= FEW_ROWS * len(run) and row < LONG_ROW:
            return False
        return row * self.stack.element_size() % ALIGNED == 0 and self.stack.data_ptr() % ALIGNED == 0

    def narrow(self, run: list[ExpertRows]) -> bool:
        """Whether that call's products are in a dtype of 16 bits, and nothing is added to them in FP32."""
        return self.dtype != torch.float32 and self.bias is None and self.groups(run)

    def one_by_one(self, parts: Sequence[torch.Tensor], run: list[ExpertRows]) -> torch.Tensor:
        """The same in one call of torch's for each entry of ``run``, whose experts may come in any order, and again.

        Args:
            parts: ``[rows, K]`` of each entry.
            run: as there.
        """
        return self._with_bias(self._one_by_one(parts, run), run)

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

    def _one_by_one(self, parts: Sequence[torch.Tensor], run: list[ExpertRows]) -> torch.Tensor:
        """Without the bias."""
        counts = [one.rows for one in run]
        if max(counts) < self.widens:
            pairs = zip(run, parts, strict=True)
            return torch.cat(
                [product(rows.to(self.dtype), self._matrix(one.expert, self.dtype)) for one, rows in pairs]
            ).float()
        out = torch.empty(sum(counts), self.stack.shape[1], dtype=torch.float32, device="cpu")
        for (expert, count), rows, into in zip(run, parts, torch.split_with_sizes(out, counts), strict=True):
            dtype = self.dtype if count < self.widens else torch.float32
            if count <= FEW_ROWS or dtype != torch.float32:
                into.copy_(product(rows.to(dtype), self._matrix(expert, dtype)))
            else:
                torch.mm(rows.float(), self._matrix(expert, torch.float32).T, out=into)
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


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``[n, K]`` x ``[N, K]`` -> ``[n, N]``, by the call of torch's that takes least for so few rows."""
    count, (size, row) = rows.shape[0], matrix.shape
    if matrix.dtype != torch.float32 or count > FEW_ROWS or row >= LONG_ROW:
        return linear(rows, matrix)
    if count > 1:
        return torch.mm(matrix, rows.T).T
    if size % 2:
        return linear(rows, matrix)
    # two halves are a batch, for which the library reads the matrix in order; one matrix it does not
    return torch.bmm(matrix.view(2, size // 2, row), rows.T.expand(2, row, 1)).view(1, size)


CPU = Cpu()
