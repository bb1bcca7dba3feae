"""One run of the tuner: which points, in which order, with how much time, and what is written when."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from epfuse.arguments import checks_enums
from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.families.family import CallKind, Stage
from epfuse.families.registry import READABLE, default_ranges, serving
from epfuse.measured import store
from epfuse.measured.schema import Measurement, TileRow
from epfuse.policy.call import decide
from epfuse.stages.tiles import GemmTile, LayerTiles, rows_per_expert
from epfuse.target import Target
from epfuse.tuning.search import TileBench, TuningOutcome, TuningPlan, TuningPoint, search
from epfuse.tuning.space import Space, block_ms, candidates, known_candidates

Write = Callable[["TuningRequest", Path, WeightFormat, Mapping[Stage, Iterable[TileRow]]], None]


@checks_enums
@dataclass(frozen=True)
class Device:
    """Where a run measures.

    Attributes:
        target: its kernels.
        name: the product, as torch names it.
        torch, triton: versions.
    """

    target: Target
    name: str
    torch: str
    triton: str


@checks_enums
@dataclass(frozen=True)
class TuningRequest:
    """What to tune.

    Attributes:
        device: where.
        shape: the layer's sizes.
        paths: paths to tune, on the weights that each reads best.
        tokens: token counts.
        folder: of the tables that are written.
        source: the command, for the record.
        extra: further tiles to try, by token count.
        space: how much is tried besides.
        bias: of both projections or none.
    """

    device: Device
    shape: LayerShape
    paths: tuple[Path, ...]
    tokens: tuple[int, ...]
    folder: pathlib.Path
    source: str
    extra: tuple[tuple[int, LayerTiles], ...] = ()
    space: Space = Space.FULL
    bias: Bias = Bias.NONE

    def points(self) -> list[TuningPoint]:
        """Every path at every token count.

        Raises:
            UnsupportedTarget: the target has no kernel for a path.
        """
        return [point_of(self.device.target, path, tokens) for path in self.paths for tokens in self.tokens]


@checks_enums
def point_of(target: Target, path: Path, tokens: int) -> TuningPoint:
    """T on a path, with the weights that it reads best.

    Raises:
        UnsupportedTarget: the target has no kernel for the path.
    """
    forms = READABLE.get(target, {}).get(path, ())
    if not forms or not target.is_gpu:  # a library's products have no tiles to search
        raise UnsupportedTarget(f"path {path.value!r} has no kernel for {target.value} with tiles to search")
    return TuningPoint(path, forms[0], tokens)


class TuningWatch(Protocol):
    """Who follows a run."""

    def begin(self, plan: TuningPlan, index: int, points: int) -> None:
        """A point is next."""
        ...

    def advance(self, steps: int) -> None:
        """Stage timings of the point that are done or skipped."""
        ...

    def end(self, outcome: TuningOutcome) -> None:
        """The point is done and written."""
        ...


def pending(request: TuningRequest, part: tuple[int, int] = (1, 1)) -> list[TuningPoint]:
    """The points that are not in the tables yet; of N parts the I-th.

    A point is done if the tables have it from the same device with the same versions.

    Args:
        request: what to tune.
        part: (I, N): several ranks each take a part, and write to the same tables.
    """
    index, parts = part
    mine = request.points()[index - 1 :: parts]
    done = {
        (measurement.path, measurement.weights, row.tokens)
        for measurement in store.read_table(request.folder, request.device.target, Stage.DOWN).measurements
        if measurement.key == _measurement(request, measurement.path, measurement.weights, ()).key
        and (measurement.torch, measurement.triton) == (request.device.torch, request.device.triton)
        for row in measurement.rows
    }
    return [point for point in mine if (point.path, point.weights, point.tokens) not in done]


def known_tiles(kind: CallKind) -> list[GemmTile]:
    """Tiles of either stage that the target's defaults and its tables hold for a path, of every layer and device.

    Args:
        kind: of the calls, on one path and one format.
    """
    defaults = [entry.tiles for entry in default_ranges(kind)]
    found = [tile for tiles in defaults for tile in (tiles.gate_up, tiles.down)]
    for stage in Stage:
        for measurement in store.shipped(kind.target, stage).measurements:
            if (measurement.path, measurement.weights) == (kind.path, kind.form):
                found += [row.tile for row in measurement.rows]
    return list(dict.fromkeys(found))


def plan_of(request: TuningRequest, point: TuningPoint) -> TuningPlan:
    """What to try at a point: today's tiles, the extra ones, and the search space."""
    device = request.device
    kind = CallKind(point.path, device.target, request.shape, bias=request.bias, device_name=device.name)
    kind = kind.on(point.path, point.weights)
    before = decide(kind, point.tokens).tiles
    assert before is not None
    rows = rows_per_expert(point.tokens, request.shape)
    given = [before, *(tiles for tokens, tiles in request.extra if tokens == point.tokens)]
    families = serving(kind)
    known = known_tiles(kind) if request.space is Space.KNOWN else []
    tries: dict[int, dict[Stage, list[GemmTile]]] = {}
    sizes = block_ms(families, rows)
    for block_m in sorted({*sizes, *(tiles.block_m for tiles in given)}):
        tries[block_m] = {}
        for stage in Stage:
            first = [getattr(tiles, stage.value) for tiles in given if tiles.block_m == block_m]
            if request.space is Space.KNOWN:
                space = known_candidates(kind, known, families, stage, block_m)
            else:
                space = candidates(kind, families, stage, block_m, rows)
            tries[block_m][stage] = list(dict.fromkeys([*first, *space]))
    return TuningPlan(point, before, tries)


def run(
    request: TuningRequest,
    plans: Sequence[TuningPlan],
    bench: TileBench,
    watch: TuningWatch,
    seconds: float,
    clock: Callable[[], float],
    write: Write | None = None,
) -> list[TuningOutcome]:
    """Search every point; each is written as soon as it is done, so a run that ends early can be taken up again.

    Args:
        request: what to tune.
        plans: of the points, in order.
        bench: times and judges.
        watch: is told of the progress.
        seconds: for the whole run; of what is left each point gets a part in proportion to what it has to try. Points
            that are not begun in time are left for the next run.
        clock: seconds.
        write: writes a point's rows; `write_rows` if None.
    """
    end = clock() + seconds
    found = []
    for index, plan in enumerate(plans):
        left = end - clock()
        if left <= 0:
            break
        watch.begin(plan, index, len(plans))
        share = plan.steps / max(1, sum(later.steps for later in plans[index:]))
        outcome = search(plan, bench, clock() + left * share, clock, watch.advance)
        (write or write_rows)(request, plan.point.path, plan.point.weights, outcome.rows)
        watch.end(outcome)
        found.append(outcome)
    return found


@checks_enums
def write_rows(
    request: TuningRequest, path: Path, weights: WeightFormat, rows: Mapping[Stage, Iterable[TileRow]]
) -> None:
    """Merge rows of both stages into the tables of the request's folder."""
    found = {stage: _measurement(request, path, weights, rows[stage]) for stage in Stage}
    store.merge(request.folder, request.device.target, found)


def _measurement(request: TuningRequest, path: Path, weights: WeightFormat, rows: Iterable[TileRow]) -> Measurement:
    return Measurement(
        device=request.device.name,
        path=path,
        weights=weights,
        shape=request.shape,
        bias=request.bias,
        torch=request.device.torch,
        triton=request.device.triton,
        date=datetime.datetime.now(datetime.UTC).date(),
        source=request.source,
        rows=tuple(rows),
    )
