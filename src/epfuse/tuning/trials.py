"""Tiles that somebody names, timed and judged: the figures of a notebook, with a command that makes them again."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError, first_fault
from epfuse.families.family import Stage
from epfuse.input_file import read_file
from epfuse.measured.schema import TileEntry
from epfuse.stages.tiles import LayerTiles
from epfuse.target import Target
from epfuse.tuning.run import TuningRequest, point_of, write_rows
from epfuse.tuning.search import TileBench, Timed, TuningPlan, TuningPoint, attempt, row_of

LARGEST_FILE = 1 << 20
"""Bytes: some 4,000 trials."""


class Trial(BaseModel):
    """One pair of tiles at one token count, as it stands in a file.

    Attributes:
        path: what runs, on the weights that it reads best.
        tokens: T.
        block_m: rows of a block.
        gate_up, down: the tiles.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    path: Path
    tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    block_m: Annotated[int, Field(ge=8, le=1 << 12)]
    gate_up: TileEntry
    down: TileEntry

    def tiles(self) -> LayerTiles:
        """As a call takes them; ConfigError if no kernel does."""
        return LayerTiles(self.block_m, self.gate_up, self.down)


@checks_enums
@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        trial: as it was named.
        weights: what the path read.
        layer_us: of a whole call, median; None if it did not run.
        stage_us: of each stage alone; empty unless the call was right.
        floor_us: of each stage, at the device's measured rates; empty unless both stages were right.
        fault: why it does not count; None if it does.
    """

    trial: Trial
    weights: WeightFormat
    layer_us: float | None
    stage_us: dict[Stage, float]
    floor_us: dict[Stage, float]
    fault: str | None

    @property
    def microseconds(self) -> float:
        """Of a whole call that was right."""
        assert self.layer_us is not None
        return self.layer_us

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return self.trial.model_dump(mode="json") | {
            "tiles": self.trial.tiles().key,
            "weights": self.weights.value,
            "layer_us": self.layer_us,
            **{f"{stage.value}_us": self.stage_us.get(stage) for stage in Stage},
            **{f"{stage.value}_floor_us": self.floor_us.get(stage) for stage in Stage},
            "fault": self.fault,
        }


def read_trials(file: pathlib.Path) -> tuple[Trial, ...]:
    """The trials of a JSON file, a list of `Trial`.

    Raises:
        ConfigError: the file is no such list, or a tile is none that a kernel takes; names the place.
    """
    data = read_file(file, "list of trials", LARGEST_FILE)
    try:
        trials = TypeAdapter(tuple[Trial, ...]).validate_json(data)
    except ValidationError as error:
        place, fault = first_fault(error, "the file")
        raise ConfigError(f"{file}: {place}: {fault}") from None
    if not trials:
        raise ConfigError(f"{file} lists no trial")
    for number, trial in enumerate(trials):
        try:
            trial.tiles()
        except ConfigError as error:
            raise ConfigError(f"{file}: {number}: {error}") from None
    return trials


@checks_enums
def plans_of(trials: Iterable[Trial], target: Target) -> list[TuningPlan]:
    """The trials as plans, for the compiler."""
    plans = []
    for trial in trials:
        tiles = trial.tiles()
        tries = {tiles.block_m: {Stage.GATE_UP: [tiles.gate_up], Stage.DOWN: [tiles.down]}}
        plans.append(TuningPlan(point_of(target, trial.path, trial.tokens), tiles, tries))
    return plans


@checks_enums
def run_trials(
    trials: Sequence[Trial], target: Target, bench: TileBench, done: Callable[[TrialResult], None] = lambda result: None
) -> list[TrialResult]:
    """Time every trial: the whole call, and if that is right each stage alone.

    Trials of one path and token count run one after another, wherever they stand in the list; the first of them whose
    call is right makes what the stages are held against.
    """
    results = []
    for trial in sorted(trials, key=lambda trial: (trial.path.value, trial.tokens)):
        result = _run(trial, point_of(target, trial.path, trial.tokens), bench)
        results.append(result)
        done(result)
    return results


def _run(trial: Trial, point: TuningPoint, bench: TileBench) -> TrialResult:
    tiles = trial.tiles()
    whole = attempt(partial(bench.layer, point, tiles))
    if isinstance(whole, str):
        return TrialResult(trial, point.weights, None, {}, {}, whole)
    alone: dict[Stage, float] = {}
    fault = whole.fault
    for stage, tile in ((Stage.GATE_UP, tiles.gate_up), (Stage.DOWN, tiles.down)):
        if fault is None:
            timed = attempt(partial(bench.stage, point, stage, tiles.block_m, tile))
            fault = timed if isinstance(timed, str) else timed.fault
            if isinstance(timed, Timed):
                alone[stage] = timed.microseconds
    floors = {stage: bench.floor_us(point, stage) for stage in Stage} if fault is None else {}
    return TrialResult(trial, point.weights, whole.microseconds, alone, floors, fault)


def fastest(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Of each path and token count the right trial whose call is the fastest."""
    best: dict[tuple[Path, int], TrialResult] = {}
    for result in results:
        key = (result.trial.path, result.trial.tokens)
        if result.fault is None and (key not in best or result.microseconds < best[key].microseconds):
            best[key] = result
    return list(best.values())


def keep_fastest(request: TuningRequest, results: Iterable[TrialResult]) -> int:
    """Write the fastest trials to the tables; how many there were.

    Args:
        request: device, shape, folder and command; its paths and token counts are not looked at.
        results: of all trials.
    """
    chosen = fastest(results)
    for result in chosen:
        trial, tiles, us = result.trial, result.trial.tiles(), result.microseconds
        rows = {
            stage: [row_of(trial.tokens, tiles.block_m, tile, result.stage_us[stage], result.floor_us[stage], us)]
            for stage, tile in ((Stage.GATE_UP, tiles.gate_up), (Stage.DOWN, tiles.down))
        }
        write_rows(request, trial.path, result.weights, rows)
    return len(chosen)
