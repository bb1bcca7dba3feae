"""Fit the time model of tiles to each product's measured rows, judge it on rows that are left out, and write it down.

    python -m tools.fit_tiles [--judge]

Writes ``src/epfuse/measured/tables/sm_90/times.json``. Least squares of the logarithms of calls' and stages' times, by
Levenberg-Marquardt with numerical derivatives. Up to four rows an expert, where every tile of the space was tried, a
tile that is predicted faster than the row's own counts as an error too. Calls in many tiles, slow ones among them, that
were timed at a few counts (`TRIED`) count by how far each is from the others. Numbers that a product's rows don't
determine stay near those of the product before it: the H100's rows have hardly a tile that lost, so what a
multiprocessor takes for a block is the H200's there.

``--judge`` leaves out a layer, a token count, or a layer's token count, fits to the rest, and asks the lookup and the
model for the tiles there, in the code that calls run, with tables without these rows. It prints how far both are from
the best row that was measured there, where both chose a block that was measured. Then it leaves out all of a layer's
width and depth, and looks at the counts with many tiles.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind, Stage
from epfuse.hardware.tile_time import WEIGHT_BYTES, RowLoad, TileTimes, gemm_us, load_of, load_us
from epfuse.measured import store
from epfuse.measured.fits import FitEntry, FitFile, fit_path
from epfuse.measured.schema import Measurement, TileEntry
from epfuse.policy.tiles import nearest_ranges, tile_ranges
from epfuse.report.write import write_atomic
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90Tile, has_few_tiles
from epfuse.target import Target

PATH, WEIGHTS, UNITS = Path.W8A16, WeightFormat.FRAGMENT, 132
RECORDS = pathlib.Path(__file__).parents[1] / "docs" / "records"
READ = {"NVIDIA H200": 4.66, "NVIDIA H100 80GB HBM3": 3.17}
"""TB/s that a card read in the runs beside peers: with a row's ``roofline`` it says how many experts were active."""
FEW_ROWS, SPLIT_ROWS = 4.0, 0.5
STAGE_WEIGHT, RANK_WEIGHT, LOOSE, TIGHT = 0.5, 0.7, 0.03, 0.3
TRIED_WEIGHT, MOST_TRIED = 4.0, 10
"""Of a count with many tiles, and how many of them are fitted: the fastest half, and others."""
TRIED = {"NVIDIA H200": ("2026-11-30-h200-few-rows.json", "2026-11-30-h200-few-rows-second.json")}
"""Records of such counts, in docs/records."""

START = {
    "read": 4.5, "call": 12.0, "packed_call": 5.0, "wave": 1.0, "step": 0.2, "latency": 2.0, "share": 1.0, "sums": 0.5,
    "weight0": 100.0, "weight1": 60.0, "weight2": 60.0, "column0": 2.0, "column1": 1.5, "column2": 1.2,
    "store": 100.0, "end": 0.5, "rows": 0.2, "packed_rows": 0.3, "norm": 3.0, "step_norm": 2.0, "stage": 4.0,
}  # fmt: skip
"""First guesses; norms without their 1. ``stage`` is what a stage takes that is timed alone, besides its GEMM."""
OF_MEMORY = ("read", "call", "stage", "rows", "packed_rows", "packed_call")
ORDINARY = (
    Sm90Tile(64, 128, 0, 4, 4), Sm90Tile(64, 128, 0, 4, 3), Sm90Tile(128, 128, 0, 4, 3), Sm90Tile(128, 128, 0, 4, 4),
    Sm90Tile(128, 128, 4, 8, 3),
)  # fmt: skip
SPLIT = tuple(Sm90Tile(64, 128, 0, 4, stages, split_k=split) for stages, split in ((3, 2), (3, 4), (3, 8), (4, 2)))


@dataclass(frozen=True)
class Row:
    """A measured row of both stages; ``load`` as the routings of the run were, microseconds."""

    shape: LayerShape
    tokens: int
    tiles: LayerTiles
    load: RowLoad
    gate_up: float
    down: float
    layer: float

    @property
    def expected(self) -> float:
        """Rows an expert."""
        return self.tokens * self.shape.top_k / self.shape.experts


def rows_of(device: str) -> list[Row]:
    """A product's rows, of the tables that ship."""
    tables = {stage: store.read_table(store.TABLES, Target.SM90, stage).measurements for stage in Stage}
    downs = {one.key: one for one in tables[Stage.DOWN]}
    found = []
    for measurement in tables[Stage.GATE_UP]:
        kind = measurement.device, measurement.path, measurement.weights, measurement.bias
        if kind != (device, PATH, WEIGHTS, Bias.NONE) or has_few_tiles(measurement.shape):  # of those nobody asks it
            continue
        shape = measurement.shape
        weights = 2 * shape.intermediate * shape.hidden * WEIGHT_BYTES
        others = {(row.tokens, row.block_m): row for row in downs[measurement.key].rows}
        for row in measurement.rows:
            down = others[row.tokens, row.block_m]
            if row.microseconds is None or row.roofline is None or down.microseconds is None:
                continue  # of whole calls that were tried in many tiles
            assert row.layer_microseconds is not None
            tiles = LayerTiles(row.block_m, row.tile, down.tile)
            load = load_of(row.block_m, tiles.gate_up, shape, row.tokens)
            if row.tokens * shape.top_k / shape.experts < FEW_ROWS:
                factor = row.roofline * row.microseconds * READ[device] * 1e6 / weights / load.active
                load = RowLoad(*(factor * value for value in asdict(load).values()))
            times = (row.microseconds, down.microseconds, row.layer_microseconds)
            found.append(Row(shape, row.tokens, tiles, load, *times))
    return found


@dataclass(frozen=True)
class Tried:
    """Calls at one count in many tiles, with the microseconds, fastest first; ``active``: experts of each routing."""

    shape: LayerShape
    tokens: int
    active: tuple[int, ...]
    calls: tuple[tuple[LayerTiles, float], ...]

    def us(self, times: TileTimes, tiles: LayerTiles) -> float:
        """The mean over the routings, predicted."""
        expected = load_of(tiles.block_m, tiles.gate_up, self.shape, self.tokens)
        found = 0.0
        for active, calls in Counter(self.active).items():
            load = RowLoad(*(active / expected.active * value for value in astuple(expected)))
            found += calls * load_us(times, tiles, self.shape, self.tokens, load)
        return found / len(self.active)


def tried_of(device: str) -> list[Tried]:
    """The counts of the product's records; none if it has none."""
    found = []
    for name in TRIED.get(device, ()):
        record = json.loads((RECORDS / name).read_text())
        tiles = [TypeAdapter(TileEntry).validate_python(tile) for tile in record["tiles"]]
        for point in record["points"]:
            calls = [(LayerTiles(block_m, tiles[up], tiles[down]), us) for block_m, up, down, us in point["calls"]]
            calls.sort(key=lambda call: call[1])
            found.append(Tried(LayerShape(**point["shape"]), point["tokens"], tuple(point["active"]), tuple(calls)))
    return found


def tried_residuals(times: TileTimes, tried: Sequence[Tried]) -> list[float]:
    """How far each call of a count is from the others, and a little of what all are wrong by."""
    found = []
    for point in tried:
        half, slow = point.calls[: MOST_TRIED // 2], point.calls[MOST_TRIED // 2 :]
        chosen = half + slow[:: max(1, 2 * len(slow) // MOST_TRIED)]
        logs = [math.log(point.us(times, tiles) / us) for tiles, us in chosen]
        mean = statistics.mean(logs)
        found += [mean, *(TRIED_WEIGHT * (each - mean) / math.sqrt(len(logs)) for each in logs)]
    return found


def numbers(values: Sequence[float], device: str) -> tuple[TileTimes, float]:
    """The model's numbers of their logarithms, and what a stage alone takes besides."""
    v = dict(zip(START, map(math.exp, values), strict=True))
    kinds = {name: tuple(v.pop(f"{name}{kind}") for kind in range(3)) for name in ("weight", "column")}
    stage = v.pop("stage")
    v |= {name: 1 + v[name] for name in ("norm", "step_norm")}
    return TileTimes(device=device, units=UNITS, **v, **kinds), stage  # type: ignore[arg-type]


def predicted(times: TileTimes, row: Row) -> tuple[float, float, float]:
    """gate_up, down, and the call, in microseconds."""
    gate_up, down = (_gemm(times, row, stage, tile) for stage, tile in _tiles(row))
    return gate_up, down, load_us(times, row.tiles, row.shape, row.tokens, row.load)


def _tiles(row: Row) -> tuple[tuple[Stage, GemmTile], tuple[Stage, GemmTile]]:
    return (Stage.GATE_UP, row.tiles.gate_up), (Stage.DOWN, row.tiles.down)


def _gemm(times: TileTimes, row: Row, stage: Stage, tile: GemmTile) -> float:
    sizes = (row.shape.hidden, row.shape.intermediate)
    outputs, inputs = (2 * sizes[1], sizes[0]) if stage is Stage.GATE_UP else sizes
    return gemm_us(times, tile, row.tiles.block_m, row.load, outputs, inputs)


def residuals(
    values: Sequence[float],
    rows: Sequence[Row],
    tried: Sequence[Tried],
    device: str,
    prior: Sequence[float],
    tight: bool,
) -> Any:
    """What least squares makes small."""
    times, stage = numbers(values, device)
    found = []
    for row in rows:
        gate_up, down, call = predicted(times, row)
        found.append(math.log(call / row.layer))
        found += [STAGE_WEIGHT * math.log((one + stage) / us) for one, us in ((gate_up, row.gate_up), (down, row.down))]
        if row.tiles.block_m <= 16 and not row.tiles.packed and row.expected <= FEW_ROWS:
            others = ORDINARY + (SPLIT if row.expected <= SPLIT_ROWS else ())
            for (which, _), own in zip(_tiles(row), (gate_up, down), strict=True):
                for other in others:
                    ratio = (own + stage) / (_gemm(times, row, which, other) + stage)
                    found.append(RANK_WEIGHT * max(0.0, math.log(ratio)))
    found += tried_residuals(times, tried)
    held = [TIGHT if tight and name not in OF_MEMORY else LOOSE for name in START]
    found += [weight * (value - first) for value, first, weight in zip(values, prior, held, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def fit(rows: Sequence[Row], tried: Sequence[Tried], device: str, prior: Sequence[float] | None = None) -> list[float]:
    """Logarithms of the numbers, by Levenberg-Marquardt.

    Args:
        rows: of one product.
        tried: counts of the product with many tiles.
        device: the product.
        prior: another product's; None for the first guesses.
    """
    tight, prior = prior is not None, list(prior or map(math.log, START.values()))
    values, damping = list(prior), 1e-2
    values[0] = math.log(READ[device])
    now = residuals(values, rows, tried, device, prior, tight)
    for _ in range(60):
        columns = []
        for index in range(len(values)):
            moved = list(values)
            moved[index] += 1e-4
            columns.append((residuals(moved, rows, tried, device, prior, tight) - now) / 1e-4)
        jacobian = torch.stack(columns, 1)
        square, slope = jacobian.T @ jacobian, jacobian.T @ now
        before = float(now @ now)
        while damping < 1e6:
            step = torch.linalg.solve(square + damping * torch.diag(square.diagonal() + 1e-6), -slope).clamp(-0.7, 0.7)
            moved = [value + float(change) for value, change in zip(values, step, strict=True)]
            after = residuals(moved, rows, tried, device, prior, tight)
            if float(after @ after) < before:
                values, now, damping = moved, after, max(damping / 4, 1e-9)
                break
            damping *= 4
        if float(now @ now) > before * (1 - 1e-5):
            break
    return values


def error(values: Sequence[float], rows: Sequence[Row], device: str) -> list[float]:
    """Logarithms of predicted over measured calls."""
    times, _ = numbers(values, device)
    return [math.log(predicted(times, row)[2] / row.layer) for row in rows]


def entry(values: Sequence[float], device: str, rows: Sequence[Row], other_shape: Sequence[float]) -> FitEntry:
    """The fit as it stands in the file."""
    own = {name: value for name, value in asdict(numbers(values, device)[0]).items() if name not in ("device", "units")}
    rounded = {
        name: tuple(float(f"{v:.4g}") for v in value) if isinstance(value, tuple) else float(f"{value:.4g}")
        for name, value in own.items()
    }
    return FitEntry(
        device=device,
        path=PATH,
        weights=WEIGHTS,
        source="gate_up.json and down.json beside this file, by python -m tools.fit_tiles",
        points=len(rows),
        error=round(_rms(error(values, rows, device)), 4),
        error_other_shape=round(_rms(other_shape), 4),
        units=UNITS,
        numbers=rounded,
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) or 1e-4


def judge(
    device: str,
    rows: Sequence[Row],
    prior: Sequence[float] | None,
    errors: Sequence[float],
    name: str,
    group: Callable[[Row], Any],
) -> None:
    """Print how far both choices are from the best row, with each group of rows left out in turn."""
    found = []
    for left_out in dict.fromkeys(map(group, rows)):
        inside = [row for row in rows if group(row) == left_out]
        points = dict.fromkeys((row.shape, row.tokens) for row in inside)
        known = {point: [row for row in inside if (row.shape, row.tokens) == point] for point in points}
        if all(len(each) < 2 for each in known.values()):
            continue
        rest = [row for row in rows if group(row) != left_out]
        values = fit(rest, (), device, prior)
        with _without(device, lambda row, out=left_out: group(row) == out, rows, entry(values, device, rest, errors)):
            for (shape, tokens), alternatives in known.items():
                if len(alternatives) < 2:
                    continue
                best = min(row.layer for row in alternatives)
                chosen = []
                for tiles in _chosen(device, shape, tokens):
                    same = [row.layer for row in alternatives if _alike(row.tiles, tiles)]
                    chosen.append(same[0] / best if same else None)
                found.append((shape, tokens, *chosen))
    both = [(near, model) for _, _, near, model in found if near is not None and model is not None]
    print(f"{device}, {name} left out: {len(found)} points, {len(both)} where both chose a block that was measured")
    _tell(*zip(*both, strict=True))
    for shape, tokens, near, model in found:
        if near != model:
            sizes = f"H={shape.hidden} I={shape.intermediate} L={shape.local_experts}"
            print(f"  {sizes} T={tokens}: {near and round(near, 3)} -> {model and round(model, 3)}")


def judge_tried(
    device: str, rows: Sequence[Row], tried: Sequence[Tried], prior: Sequence[float] | None, errors: Sequence[float]
) -> None:
    """Print how far both choices are from the best pair of tiles that was tried, as for a layer that nobody tuned.

    All rows and counts of a layer's H and I are left out, in turn. A choice that was not tried says nothing.
    """

    def sizes(shape: LayerShape) -> tuple[int, int]:
        return shape.hidden, shape.intermediate

    found: tuple[list[float], list[float]] = [], []
    for left_out in dict.fromkeys(sizes(point.shape) for point in tried):
        rest = [row for row in rows if sizes(row.shape) != left_out]
        values = fit(rest, [point for point in tried if sizes(point.shape) != left_out], device, prior)
        new = entry(values, device, rest, errors)
        with _without(device, lambda row, out=left_out: sizes(row.shape) == out, rows, new):
            for point in tried:
                if sizes(point.shape) != left_out:
                    continue
                times, best = dict(point.calls), point.calls[0][1]
                for tiles, ratios in zip(_chosen(device, point.shape, point.tokens), found, strict=True):
                    ratios += [times[tiles] / best] if tiles in times else []
    print(f"{device}, a layer's width and depth left out: {len(tried)} counts with many tiles")
    _tell(*found)


def _chosen(device: str, shape: LayerShape, tokens: int) -> tuple[LayerTiles, LayerTiles]:
    """The tiles of the nearest row or default, and those with the model."""
    kind = CallKind(PATH, Target.SM90, shape, frozenset({WEIGHTS}), device_name=device)
    nearest, model = (
        next(choice.tiles for first, choice in reversed(ranges(kind)) if first <= tokens)
        for ranges in (nearest_ranges, tile_ranges)
    )
    return nearest, model


def _tell(*found: Sequence[float]) -> None:
    for who, ratios in zip(("nearest row", "with the model"), found, strict=False):
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(f"  {who}: {mean:.4f} of the best in the geometric mean of {len(ratios)}, worst {max(ratios):.3f}")


def _alike(first: LayerTiles, second: LayerTiles) -> bool:
    return first.block_m == second.block_m and first.packed == second.packed


@contextmanager
def _without(device: str, is_out: Callable[[Row], bool], rows: Sequence[Row], new: FitEntry) -> Iterator[None]:
    """Tables without rows, and the fit to the rest, where calls look."""
    out = {(row.shape, row.tokens, row.tiles.block_m) for row in rows if is_out(row)}

    def kept(measurement: Measurement) -> Measurement:
        shape = measurement.shape
        left = [
            row
            for row in measurement.rows
            if measurement.device != device or (shape, row.tokens, row.block_m) not in out
        ]
        return measurement.model_copy(update={"rows": tuple(left)})

    before = store.TABLES
    tables = {stage: store.read_table(before, Target.SM90, stage) for stage in Stage}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for stage, table in tables.items():
            found_all = tuple(one for one in map(kept, table.measurements) if one.rows)
            path = store.table_path(folder, Target.SM90, stage)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, table.model_copy(update={"measurements": found_all}).model_dump_json())
        write_atomic(fit_path(folder, Target.SM90), FitFile(target=Target.SM90, fits=(new,)).model_dump_json())
        store.TABLES = folder
        store.shipped.cache_clear()
        try:
            yield
        finally:
            store.TABLES = before
            store.shipped.cache_clear()


def main() -> None:
    """Fit, judge if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="print what it chooses for rows that are left out")
    arguments = parser.parse_args()
    fits, prior = [], None
    for device in READ:
        rows, tried = rows_of(device), tried_of(device)
        values = fit(rows, tried, device, prior)
        others: list[float] = []
        for shape in dict.fromkeys(row.shape for row in rows):
            others_tried = [point for point in tried if point.shape != shape]
            rest = fit([row for row in rows if row.shape != shape], others_tried, device, prior)
            others += error(rest, [row for row in rows if row.shape == shape], device)
        fits.append(entry(values, device, rows, others))
        print(fits[-1].model_dump_json(exclude={"source"}))
        if arguments.judge:
            judge(device, rows, prior, others, "a layer", lambda row: row.shape)
            judge(device, rows, prior, others, "a token count", lambda row: row.tokens)
            judge(device, rows, prior, others, "a layer's token count", lambda row: (row.shape, row.tokens))
            judge_tried(device, rows, tried, prior, others)
        prior = values
    path = fit_path(store.TABLES, Target.SM90)
    write_atomic(
        path, json.dumps(FitFile(target=Target.SM90, fits=tuple(fits)).model_dump(mode="json"), indent=2) + "\n"
    )
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
