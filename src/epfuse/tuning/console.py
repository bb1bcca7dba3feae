"""The tuner's progress and its result, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from rich.table import Table

from epfuse.families.family import Stage
from epfuse.report.terminal import Console, figures, in_parts, make_table
from epfuse.tuning.run import Device, TuningRequest
from epfuse.tuning.search import TuningOutcome, TuningPlan
from epfuse.tuning.trials import TrialResult, fastest


class ProgressWatch:
    """A `run.TuningWatch` that moves bars.

    Args:
        progress: the bars.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._compiling = progress.add_task("compiling", total=None, visible=False)
        self._point = progress.add_task("", total=None, visible=False)

    def compiled(self, done: int, candidates: int) -> None:
        """Tiles whose resources are known."""
        self._progress.update(self._compiling, completed=done, total=candidates, visible=True)

    def pruned(self, dropped: int, candidates: int) -> None:
        """Print how many tiles are left to be timed."""
        self._progress.console.print(
            f"{dropped} of {candidates} tiles dropped by their compiled resources", highlight=False
        )

    def begin(self, plan: TuningPlan, index: int, points: int) -> None:
        """Start a point's bar."""
        self._progress.reset(
            self._point,
            description=f"{plan.point.name} ({index + 1} of {points})",
            total=plan.steps,
            visible=True,
        )

    def advance(self, steps: int) -> None:
        """Move it."""
        self._progress.advance(self._point, steps)

    def end(self, outcome: TuningOutcome) -> None:
        """Print what came out, above the bars."""
        self._progress.console.print(
            f"{outcome.point.name}: {outcome.before_us:.1f} -> {outcome.after_us:.1f} us  {outcome.tiles.key}"
            f"  ({len(outcome.dropped)} dropped, {outcome.untried} untried)",
            highlight=False,
        )


def show(request: TuningRequest, outcomes: Sequence[TuningOutcome], planned: int, console: Console) -> None:
    """Print before and after."""
    device, shape = request.device, request.shape
    console.print(
        f"H={shape.hidden} I={shape.intermediate} E={shape.experts} L={shape.local_experts} K={shape.top_k} on"
        f" {device.name} ({device.target.value}), torch {device.torch}, triton {device.triton}; tables in"
        f" {request.folder}",
        highlight=False,
    )
    numbers = ("T", "before us", "after us", "faster", "gate_up of floor", "down of floor")
    table, tiles = make_table("path", *map(figures, numbers)), tile_table()
    for outcome in outcomes:
        best = [
            row for rows in outcome.rows.values() for row in rows if row.block_m == outcome.tiles.block_m
        ]  # one of each stage
        table.add_row(
            outcome.point.path.value,
            str(outcome.point.tokens),
            f"{outcome.before_us:.1f}",
            f"{outcome.after_us:.1f}",
            f"{outcome.before_us / outcome.after_us - 1:.1%}",
            *("-" if row.roofline is None else f"{row.roofline:.0%}" for row in best),
        )
        tiles.add_row(outcome.point.path.value, str(outcome.point.tokens), in_parts(outcome.tiles.key))
    if outcomes:
        console.print(table)
        console.print(tiles)
    if planned > len(outcomes):
        left = planned - len(outcomes)
        console.print(f"{left} of {planned} points were not begun in time; the same command goes on.", highlight=False)
    if not planned:
        console.print("The tables have all of it from this device and these versions; --again measures anew.")


def to_json(outcome: TuningOutcome) -> dict[str, Any]:
    """JSON-ready values."""
    return {
        "path": outcome.point.path.value,
        "weights": outcome.point.weights.value,
        "tokens": outcome.point.tokens,
        "before_us": outcome.before_us,
        "after_us": outcome.after_us,
        "tiles": outcome.tiles.key,
        "rows": {stage.value: [row.model_dump(mode="json") for row in rows] for stage, rows in outcome.rows.items()},
        "dropped": outcome.dropped,
        "untried": outcome.untried,
    }


def show_results(results: Sequence[TrialResult], device: Device, console: Console) -> None:
    """Print what came of the trials; the fastest right one of a path and token count is marked."""
    console.print(
        f"{device.name} ({device.target.value}), torch {device.torch}, triton {device.triton}", highlight=False
    )
    numbers = ("T", "layer us", "gate_up us", "down us")
    table, tiles = make_table("path", *map(figures, numbers), "verdict"), tile_table()
    best = fastest(results)
    for result in results:
        times = (result.layer_us, *(result.stage_us.get(stage) for stage in Stage))
        right = result.fault is None
        table.add_row(
            result.trial.path.value,
            str(result.trial.tokens),
            *("-" if time is None or not right else f"{time:.1f}" for time in times),
            ("fastest" if result in best else "right") if right else result.fault,
        )
        tiles.add_row(result.trial.path.value, str(result.trial.tokens), in_parts(result.trial.tiles().key))
    console.print(table)
    console.print(tiles)


def tile_table() -> Table:
    """The tiles of a table's rows, which are too long to stand in it."""
    return make_table("path", figures("T"), "block_m / gate_up / down")
