"""What the records say, as tables in Markdown: figures with epfuse and without, their spread, their aims."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.serve_on_gpu.arms import ServerArm

Record = dict[str, Any]
FIRST_SLOWER = 0.5
"""Seconds that the first requests may take longer with epfuse."""
TPOT_RATIOS = {1: 0.85, 16: 0.93, 64: 0.90, 256: 0.93}
"""Concurrency -> what TPOT with epfuse over TPOT without may be, of MiniMax-M3 in MXFP8 at 128/256."""
OFFLINE_RATIO = 1.35
AIMED_MODEL, AIMED_SIZE = "minimax-m3", (128, 256)


@dataclass(frozen=True)
class FigureRow:
    """A figure.

    Attributes:
        what: it is.
        none, epfuse: its values, one of each server or run.
        aim: in words; empty: it is only reported.
        reached: None if there is no aim, or too little to tell.
    """

    what: str
    none: tuple[float, ...]
    epfuse: tuple[float, ...]
    aim: str = ""
    reached: bool | None = None
    digits: int = 2

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"what": self.what, "none": self.none, "epfuse": self.epfuse, "aim": self.aim, "reached": self.reached}

    @property
    def ratio(self) -> float | None:
        """Epfuse's median over the other's."""
        if not self.none or not self.epfuse or statistics.median(self.none) == 0:
            return None
        return statistics.median(self.epfuse) / statistics.median(self.none)


def rows_of(records: Sequence[Record]) -> list[FigureRow]:
    """All figures of servers and offline runs that are complete, model by model.

    Of servers side by side those count, too, whose time was over: each point in their records is whole.
    """
    found = []
    sound = [record for record in records if "error" not in record]
    whole = [record for record in sound if record["complete"] or record["part"] == "alternate"]
    for model in dict.fromkeys(record["model"] for record in whole if "model" in record):
        of_model = [record for record in whole if record.get("model") == model]
        found += _server_rows(model, [record for record in of_model if record["part"] == "serve"])
        found += _turn_rows(model, [record for record in of_model if record["part"] == "alternate"])
        found += _offline_rows(model, [record for record in of_model if record["part"] == "offline"])
    return found


def _server_rows(model: str, servers: Sequence[Record]) -> list[FigureRow]:
    found = []
    for cold, words in ((True, "caches empty"), (False, "caches filled")):
        of_kind = [record for record in servers if record["cold"] is cold]
        if of_kind:
            found.append(_row(f"{model}: ready, {words}, s", of_kind, lambda record: record["ready_s"], digits=0))
            found.append(_first(f"{model}: first requests, {words}, s", of_kind))
    found += _point_rows(model, model, servers)
    if servers:
        found.append(_late(f"{model}: kernels of epfuse compiled or loaded after ready", servers))
    return found


def _turn_rows(model: str, servers: Sequence[Record]) -> list[FigureRow]:
    """Of servers side by side, in which a point was measured in several rounds: each round counts as a server."""
    turns = [
        record | {"points": [point for point in record["points"] if point["round"] == number]}
        for record in servers
        for number in sorted({point["round"] for point in record["points"]})
    ]
    return _point_rows(model, f"{model}, in turn", turns)


def _point_rows(model: str, words: str, servers: Sequence[Record]) -> list[FigureRow]:
    found = []
    points = {(point["isl"], point["osl"], point["concurrency"], point["new"])
              for record in servers for point in record["points"]}  # fmt: skip
    for isl, osl, concurrency, new in sorted(points, key=lambda point: (not point[3], *point[:3])):
        size = f"{isl}/{osl} c{concurrency}"
        at = _at(isl, osl, concurrency, new)
        if new:
            found.append(_p99(f"{words}: p99 TTFT of a new server, {size}, ms", servers, at))
        else:
            aimed = TPOT_RATIOS.get(concurrency) if (model, (isl, osl)) == (AIMED_MODEL, AIMED_SIZE) else 1.0
            found.append(_tpot(f"{words}: TPOT, {size}, ms", servers, at, aimed))
            found.append(_row(f"{words}: p99 TTFT, {size}, ms", servers, _of(at, "p99_ttft_ms"), digits=0))
            found.append(_row(f"{words}: total tokens/s, {size}", servers, _of(at, "total_token_throughput"), digits=0))
    return found


def _offline_rows(model: str, runs: Sequence[Record]) -> list[FigureRow]:
    found = []
    for cold, words in ((True, "caches empty"), (False, "caches filled")):
        of_kind = [record for record in runs if record["cold"] is cold]
        if not of_kind:
            continue
        row = _row(
            f"{model}: offline tokens/s, {words}",
            of_kind,
            lambda record: record["tokens_per_second"],
            digits=0,
        )
        aimed = model == AIMED_MODEL and row.ratio is not None
        found.append(_aim(row, f">= {OFFLINE_RATIO} times", row.ratio >= OFFLINE_RATIO) if aimed else row)  # type: ignore[operator]
    return found


Read = Callable[[Record], float | None]


def _at(isl: int, osl: int, concurrency: int, new: bool) -> Callable[[Record], Record]:
    def point(record: Record) -> Record:
        wanted = {"isl": isl, "osl": osl, "concurrency": concurrency, "new": new}
        return next((one for one in record["points"] if wanted.items() <= one.items()), {})

    return point


def _of(at: Callable[[Record], Record], key: str) -> Read:
    return lambda record: at(record).get(key)


def _row(what: str, records: Sequence[Record], read: Read, digits: int = 2) -> FigureRow:
    values = {arm: tuple(value for record in records if record["arm"] == arm and (value := read(record)) is not None)
              for arm in ServerArm}  # fmt: skip
    return FigureRow(what, values[ServerArm.NONE], values[ServerArm.EPFUSE], digits=digits)


def _aim(row: FigureRow, aim: str, reached: bool) -> FigureRow:
    return FigureRow(row.what, row.none, row.epfuse, aim, reached if row.none and row.epfuse else None, row.digits)


def _first(what: str, records: Sequence[Record]) -> FigureRow:
    row = _row(what, records, lambda record: record["first"]["seconds"])
    slower = statistics.median(row.epfuse) - statistics.median(row.none) if row.none and row.epfuse else 0.0
    return _aim(row, f"at most {FIRST_SLOWER} s slower", slower <= FIRST_SLOWER)


def _p99(what: str, records: Sequence[Record], at: Callable[[Record], Record]) -> FigureRow:
    """Not above what servers without epfuse had at worst: their spread, since a wide one of ours is no excuse."""
    row = _row(what, records, _of(at, "p99_ttft_ms"), digits=0)
    if not row.none or not row.epfuse:
        return row
    return _aim(row, "not above the other's worst", statistics.median(row.epfuse) <= max(row.none))


def _tpot(what: str, records: Sequence[Record], at: Callable[[Record], Record], aimed: float | None) -> FigureRow:
    row = _row(what, records, _of(at, "median_tpot_ms"), digits=3)
    return row if aimed is None or row.ratio is None else _aim(row, f"<= {aimed:g} times", row.ratio <= aimed)


def _late(what: str, records: Sequence[Record]) -> FigureRow:
    """Counted by the listener over a server's whole life; without one nothing is said."""
    row = _row(what, records, lambda record: float(sum(record["compiles"].get("ours after", {}).values())), digits=0)
    heard = [record for record in records if record["arm"] == ServerArm.EPFUSE and "ours before" in record["compiles"]]
    return FigureRow(row.what, (), row.epfuse, "0", not any(row.epfuse) if heard else None, 0)


def table(rows: Sequence[FigureRow]) -> str:
    """Markdown: medians, and in brackets the range and the number of servers."""
    lines = ["| | without epfuse | with epfuse | ratio | aim | |", "|---|---|---|---|---|---|"]
    for row in rows:
        said = {None: "", True: "yes", False: "**no**"}[row.reached]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        cells = (row.what, _cell(row.none, row.digits), _cell(row.epfuse, row.digits), ratio, row.aim, said)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high}, n={len(values)})" if len(values) > 1 else f"{middle} (n=1)"


def agreement(records: Sequence[Record]) -> list[str]:
    """How far the first requests' answers agree, between servers of one arm and between the arms: a sentence each."""
    servers = [record for record in records if record["part"] == "serve" and "first" in record]
    found = []
    for model in dict.fromkeys(record["model"] for record in servers):
        of_model = [record for record in servers if record["model"] == model]
        for one, other in (
            (ServerArm.NONE, ServerArm.NONE),
            (ServerArm.EPFUSE, ServerArm.EPFUSE),
            (ServerArm.NONE, ServerArm.EPFUSE),
        ):
            left = [record for record in of_model if record["arm"] == one]
            right = [record for record in of_model if record["arm"] == other]
            pairs = list(itertools.pairwise(left)) if one == other else list(zip(left, right, strict=False))
            if pairs:
                counts = [_alike(a["first"]["answers"], b["first"]["answers"]) for a, b in pairs]
                equal, whole = sum(count[0] for count in counts), sum(count[1] for count in counts)
                apart = max(count[2] for count in counts)
                found.append(
                    f"{model}: {one} against {other}: {equal} of {whole} tokens equal; log probabilities on the"
                    f" same prefix at most {apart:.4f} apart"
                )
    return found


def _alike(one: list[Any], other: list[Any]) -> tuple[int, int, float]:
    """Tokens that are equal, of how many, and the largest difference before the first that is not."""
    equal, whole, apart = 0, 0, 0.0
    for mine, theirs in zip(one, other, strict=False):
        whole += len(mine)
        for (token, value), (their_token, their_value) in zip(mine, theirs, strict=False):
            if token != their_token:
                break
            apart = max(apart, abs(value - their_value))
        equal += sum(a[0] == b[0] for a, b in zip(mine, theirs, strict=False))
    return equal, whole, apart
