"""The record of a run as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from epfuse.serving.record import LegRecord, PointRecord, RunRecord
from epfuse.serving.results import MeasuredLoad


def report_json(record: RunRecord) -> dict[str, Any]:
    """JSON-ready: seconds, tokens a second, and null for what is not there."""
    return {
        "schema": 1,
        "run": record.run.model_dump(mode="json", by_alias=True),
        "ok": record.ok,
        "faults": record.faults,
        "points": [_point(record, point) for point in record.points],
    }


def _point(record: RunRecord, point: PointRecord) -> dict[str, Any]:
    verdict = record.verdicts.get(point.name)
    return {
        "name": point.name,
        "state": point.state,
        "reason": point.reason,
        "point": None if point.point is None else point.point.model_dump(mode="json"),
        "files": point.files,
        "legs": [_leg(leg) for leg in point.legs],
        "verdict": None if verdict is None else asdict(verdict),
        "environment": point.facts,
    }


def _leg(record: LegRecord) -> dict[str, Any]:
    leg = record.leg
    return {
        "number": leg.number,
        "arm": leg.arm,
        "state": leg.state.value,
        "reason": leg.reason,
        "fault": record.fault,
        "gate": None if leg.gate is None else leg.gate.model_dump(mode="json"),
        "measured": None if record.measured is None else _measured(record.measured),
        "phases": None if record.phases is None else asdict(record.phases),
        "files": record.files,
    }


def _measured(found: MeasuredLoad) -> dict[str, Any]:
    return {
        "duration": found.duration,
        "completed": found.completed,
        "failed": found.failed,
        "input_tokens": found.inputs,
        "output_tokens": found.outputs,
        "total_throughput": found.total_throughput,
        "output_throughput": found.output_throughput,
        "tokens_per_second_per_user": found.per_user,
        "steady": None if found.steady is None else asdict(found.steady),
    } | {
        name: None
        if spread is None
        else {"mean": spread.mean, "std": spread.std} | {f"p{share:g}": at for share, at in spread.percentiles.items()}
        for name, spread in found.spreads.items()
    }
