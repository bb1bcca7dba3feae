"""How a matrix becomes rows; the rules are from InferenceX' fixed-seq-len configurations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from epfuse.errors import ConfigError
from epfuse.serving.entries import AnyEntry, MultiNodeEntry, MultiNodeSearch, Runners, SpecDecoding, Worker
from epfuse.serving.point import HEADROOM

SHORT = {(1024, 1024): "1k1k", (8192, 1024): "8k1k"}
"""(ISL, OSL) -> its short name."""
EVAL_LENGTHS = (8192, 1024)
LEAST_EVAL_CONCURRENCY = 16
MOST_ROWS = 10_000


@dataclass(frozen=True)
class MatrixRow:
    """A row of the expanded matrix.

    Attributes:
        key: of its entry.
        node: where it runs: a runner, or one of its nodes.
        conc: one concurrency; of several nodes all that their one job goes through.
        tp, ep, dp_attn: None where prefill and decode have their own.
        is_eval: lm-eval runs here too.
        eval_only: it runs for lm-eval only.
    """

    key: str
    entry: AnyEntry
    node: str
    isl: int
    osl: int
    conc: int | tuple[int, ...]
    spec_decoding: SpecDecoding = "none"
    tp: int | None = None
    ep: int | None = None
    dp_attn: bool | None = None
    prefill: Worker | None = None
    decode: Worker | None = None
    is_eval: bool = False
    eval_only: bool = False

    @property
    def name(self) -> str:
        """As InferenceX names an experiment: model and lengths."""
        return f"{self.entry.model_prefix}_{short_lengths(self.isl, self.osl)}"

    @property
    def max_model_len(self) -> int:
        """Tokens."""
        return self.isl + self.osl + HEADROOM


def short_lengths(isl: int, osl: int) -> str:
    """``1k1k``, ``8k1k``, or the numbers."""
    return SHORT.get((isl, osl), f"{isl}_{osl}")


@dataclass(frozen=True)
class Selection:
    """Which rows are wanted; None or empty: all.

    Attributes:
        keys: globs of entries' keys, ``*`` and ``?``.
        prefixes: what keys begin with.
        precisions, frameworks, runners: of entries.
        lengths: short names of sequence lengths.
        node: part of a node's name; each node that has it gets a row of its own.
        concurrencies: the only ones.
        max_conc: no more; an entry that has only more gets this one.
        max_tp: entries above are left out.
        max_ep: entries above get this one.
        step: factor between a range's concurrencies.
        single_node, multi_node: neither: both.
    """

    keys: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    frameworks: tuple[str, ...] = ()
    runners: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    node: str | None = None
    concurrencies: tuple[int, ...] = ()
    max_conc: int | None = None
    max_tp: int | None = None
    max_ep: int | None = None
    step: int = 2
    single_node: bool = False
    multi_node: bool = False

    def __post_init__(self) -> None:
        if self.step < 2:
            raise ConfigError(f"step is {self.step}; it must be at least 2")

    @property
    def nothing_fits(self) -> bool:
        """A limit of 0 or less leaves nothing."""
        return any(limit is not None and limit <= 0 for limit in (self.max_conc, self.max_tp, self.max_ep))

    def wants(self, entry: AnyEntry) -> bool:
        """Whether an entry is of the kind, precision, framework and runner that were asked for."""
        multi = isinstance(entry, MultiNodeEntry)
        both = self.single_node == self.multi_node
        return (
            (both or (self.multi_node if multi else self.single_node))
            and (not self.precisions or entry.precision in self.precisions)
            and (not self.frameworks or entry.framework in self.frameworks)
            and (not self.runners or entry.runner in self.runners)
        )

    def limited(self, values: Iterable[int]) -> list[int]:
        """The concurrencies of an entry that are left."""
        found = list(dict.fromkeys(values))
        if self.max_conc is not None:
            found = [value for value in found if value <= self.max_conc] or [self.max_conc]
        return [value for value in found if not self.concurrencies or value in self.concurrencies]


def select_keys(keys: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The keys that fit a glob, glob by glob in the order of ``keys``, each once.

    Raises:
        ConfigError: a glob fits no key.
    """
    keys = list(keys)
    found: dict[str, None] = {}
    for glob in globs:
        pattern = re.compile("".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in glob), re.DOTALL)
        fits = [key for key in keys if pattern.fullmatch(key)]
        if not fits:
            raise ConfigError(f"key {glob!r} fits none of {', '.join(keys)[:500]}")
        found.update(dict.fromkeys(fits))
    return list(found)


def _entries(matrix: Mapping[str, AnyEntry], selection: Selection) -> dict[str, AnyEntry]:
    keys = select_keys(matrix, selection.keys) if selection.keys else list(matrix)
    return {
        key: matrix[key]
        for key in keys
        if (not selection.prefixes or key.startswith(selection.prefixes)) and selection.wants(matrix[key])
    }


def _nodes(entry: AnyEntry, runners: Runners, part: str | None) -> list[str]:
    if part is None:
        return [entry.runner]
    return [node for node in runners.get(entry.runner, ()) if part in node]


def _check_runners(runners: Runners, wanted: Iterable[str]) -> None:
    unknown = [name for name in wanted if name not in runners]
    if unknown:
        raise ConfigError(f"runner is {unknown[0]!r}; the recipe has {', '.join(sorted(runners)) or 'none'}")


def expand(matrix: Mapping[str, AnyEntry], runners: Runners, selection: Selection = Selection()) -> list[MatrixRow]:
    """The rows of a matrix, in its order, with the points for lm-eval marked.

    Raises:
        ConfigError: a runner is unknown, a glob fits nothing, or there are more than MOST_ROWS rows.
    """
    _check_runners(runners, selection.runners)
    if selection.nothing_fits:
        return []
    rows: list[MatrixRow] = []
    for key, entry in _entries(matrix, selection).items():
        for node in _nodes(entry, runners, selection.node):
            rows += _rows(key, entry, node, selection)
        if len(rows) > MOST_ROWS:
            raise ConfigError(f"the matrix has more than {MOST_ROWS} rows; select some")
    return mark_evals(rows)


def _rows(key: str, entry: AnyEntry, node: str, selection: Selection) -> list[MatrixRow]:
    found: list[MatrixRow] = []
    for lengths in entry.seq_len_configs:
        if selection.lengths and short_lengths(lengths.isl, lengths.osl) not in selection.lengths:
            continue
        for search in lengths.search_space:
            values = selection.limited(search.concurrencies(selection.step))
            row = MatrixRow(key, entry, node, lengths.isl, lengths.osl, tuple(values), search.spec_decoding)
            if isinstance(search, MultiNodeSearch):
                found += [replace(row, prefill=search.prefill, decode=search.decode)] if values else []
                continue
            if selection.max_tp is not None and search.tp > selection.max_tp:
                continue
            ep = 1 if search.ep is None else search.ep
            row = replace(
                row,
                tp=search.tp,
                ep=ep if selection.max_ep is None else min(ep, selection.max_ep),
                dp_attn=bool(search.dp_attn),
            )
            found += [replace(row, conc=value) for value in values]
    return found


def sweep_runners(
    matrix: Mapping[str, AnyEntry], runners: Runners, runner: str, selection: Selection = Selection()
) -> list[MatrixRow]:
    """One row for each node of a runner and each entry: highest tp, lowest concurrency, at the shortest lengths.

    Args:
        matrix: key -> entry.
        runners: kind of node -> the nodes.
        runner: the kind whose nodes are looked at.
        selection: ``node`` and filters of entries; limits don't apply.

    Raises:
        ConfigError: the runner is unknown, or no node fits.
    """
    _check_runners(runners, [runner])
    nodes = [node for node in runners[runner] if selection.node is None or selection.node in node]
    if not nodes:
        raise ConfigError(f"node is {selection.node!r}, which is in none of {', '.join(runners[runner])[:500]}")
    found = []
    for key, entry in _entries(matrix, selection).items():
        if entry.runner != runner:
            continue
        for node in nodes:
            rows = _rows(key, entry, node, Selection())
            shortest = min((row.isl + row.osl, row.isl) for row in rows)
            rows = [row for row in rows if (row.isl + row.osl, row.isl) == shortest]
            found.append(min(rows, key=lambda row: (-_ranks(row), _lowest(row))))
    return [replace(row, conc=row.conc if isinstance(row.conc, int) else (min(row.conc),)) for row in found]


def _ranks(row: MatrixRow) -> int:
    if row.tp is not None:
        return row.tp
    assert row.decode is not None
    return row.decode.tp


def _lowest(row: MatrixRow) -> int:
    return row.conc if isinstance(row.conc, int) else min(row.conc)


def mark_evals(rows: Sequence[MatrixRow]) -> list[MatrixRow]:
    """The rows, those for lm-eval marked: on one node, 8k1k, highest and median of concurrencies from 16.

    The median of n sorted concurrencies is number n // 2 from 0. Each model, node, precision, kind of attention and of
    speculation has its own; layouts of ranks share them, for each concurrency is run with one of them.
    """
    groups: dict[tuple[object, ...], set[int]] = {}
    for row in rows:
        if (row.isl, row.osl) == EVAL_LENGTHS and isinstance(row.conc, int) and row.conc >= LEAST_EVAL_CONCURRENCY:
            groups.setdefault(_eval_group(row), set()).add(row.conc)
    chosen = {}
    for group, values in groups.items():
        ordered = sorted(values)
        chosen[group] = {ordered[-1], ordered[len(ordered) // 2]}
    return [
        replace(
            row,
            is_eval=(row.isl, row.osl) == EVAL_LENGTHS
            and isinstance(row.conc, int)
            and row.conc in chosen.get(_eval_group(row), ()),
        )
        for row in rows
    ]


def _eval_group(row: MatrixRow) -> tuple[object, ...]:
    entry = row.entry
    return (entry.model, row.node, entry.framework, entry.precision, row.spec_decoding, row.dp_attn)


def only_evals(rows: Iterable[MatrixRow]) -> list[MatrixRow]:
    """The rows for lm-eval, which then run for nothing else."""
    return [replace(row, eval_only=True) for row in rows if row.is_eval]


def without_evals(rows: Iterable[MatrixRow]) -> list[MatrixRow]:
    """All rows, for their speed alone."""
    return [replace(row, is_eval=False) for row in rows]
