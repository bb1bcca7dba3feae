"""A run for other tools: InferenceX' aggregate JSON, one file a point and arm, and one CSV table."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator
from typing import Any

from epfuse.serving.point import Image, PointJob
from epfuse.serving.record import PointRecord, RunRecord
from epfuse.serving.results import MeasuredLoad, Spread

NAMES: dict[str, float | None] = {"mean": None, "median": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


def measurements(record: RunRecord) -> Iterator[tuple[PointRecord, PointJob, str, list[MeasuredLoad]]]:
    """Each point and arm that has a speed, with its legs."""
    for point in record.points:
        if point.job is None or point.job.point.eval_only:
            continue
        arms: dict[str, list[MeasuredLoad]] = {}
        for leg, measured in point.measured:
            arms.setdefault(leg.leg.arm, []).append(measured)
        for arm, legs in arms.items():
            yield point, point.job, arm, legs


def aggregates(record: RunRecord) -> dict[str, dict[str, Any]]:
    """File name -> InferenceX' aggregate of one point and arm; of several legs each number is the median.

    Names and units are InferenceX': times in seconds, throughputs in tokens a second.
    """
    found = {}
    for point, job, arm, legs in measurements(record):
        several = len({leg.arm for leg in point.done.legs}) > 1 if point.done else False
        name = f"agg_{point.name}_{arm}.json" if several else f"agg_{point.name}.json"
        found[name] = _aggregate(record, job, arm, legs)
    return found


def _aggregate(record: RunRecord, job: PointJob, arm: str, legs: list[MeasuredLoad]) -> dict[str, Any]:
    point, environment = job.point, job.arm(arm).environment
    ranks = max(point.tp, 1)  # tp x pp x pcp; the latter two are 1 here
    label = {"label": job.label} if job.label else {}
    return (
        label
        | {
            "hw": point.target,
            "conc": point.concurrency,
            "image": environment.reference if isinstance(environment, Image) else "",
            "model": point.model,
            "infmax_model_prefix": point.prefix,
            "framework": point.framework,
            "precision": point.precision,
            "spec_decoding": point.spec_decoding,
            "disagg": False,
            "recipe_fingerprint": record.run.recipe_sha256,
            "isl": point.isl,
            "osl": point.osl,
            "is_multinode": False,
            "tp": point.tp,
            "pp": 1,
            "dcp_size": 1,
            "pcp_size": 1,
            "ep": _ep(job, arm),
            "dp_attention": str(point.dp_attention).lower(),
            "tput_per_gpu": statistics.median(leg.total_throughput for leg in legs) / ranks,
            "output_tput_per_gpu": statistics.median(leg.output_throughput for leg in legs) / ranks,
            "input_tput_per_gpu": statistics.median(leg.input_throughput for leg in legs) / ranks,
        }
        | _times(legs)
    )


def _ep(job: PointJob, arm: str) -> int:
    """The point's, unless the arm has expert parallelism of its own: vLLM's then is as large as tp."""
    return job.point.tp if "--enable-expert-parallel" in job.arm(arm).server.argv else job.point.ep


def _times(legs: list[MeasuredLoad]) -> dict[str, float]:
    found = {}
    for short in ("ttft", "tpot", "itl", "e2el"):
        spreads = [spread for leg in legs if (spread := leg.spreads[short]) is not None]
        if not spreads:
            continue
        for name in (*NAMES, "std"):
            seconds = statistics.median(_of(spread, name) for spread in spreads)
            found[f"{name}_{short}"] = seconds
            if short == "tpot":
                found[f"{name}_intvty"] = 1 / seconds if seconds > 0 else 0.0
    return found


def _of(spread: Spread, name: str) -> float:
    if name == "std":
        return spread.std
    share = NAMES[name]
    return spread.mean if share is None else spread.percentiles[share]


COLUMNS = (
    "run", "label", "point", "state", "reason", "arm", "leg", "leg_state", "model", "target", "isl", "osl",
    "concurrency", "tp", "ep", "dp_attention", "gpus", "completed", "failed", "duration_s", "total_tokens_per_s",
    "output_tokens_per_s", "total_tokens_per_s_per_gpu", "tokens_per_s_per_user", "steady_total_tokens_per_s",
    *(f"{name}_{short}_ms" for short in ("ttft", "tpot", "itl", "e2el") for name in ("mean", "median", "p90", "p99")),
    "gate_passed", "gate_difference", "verdict", "effect", "effect_low", "effect_high", "p_adjusted",
)  # fmt: skip


def table(record: RunRecord) -> str:
    """CSV: a row a leg, and one for a point without any; numbers that are not there are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for point in record.points:
        base: dict[str, object] = {
            "run": record.run.name,
            "label": record.run.label,
            "point": point.name,
            "state": point.state,
        }
        base |= {"reason": point.reason} | _what(point) | _verdict(record, point.name)
        if not point.legs:
            writer.writerow({key: _cell(value) for key, value in base.items()})
        for leg in point.legs:
            row = base | {"arm": leg.leg.arm, "leg": leg.leg.number, "leg_state": leg.leg.state.value}
            if leg.fault:
                row["reason"] = leg.fault
            if leg.leg.gate is not None:
                row |= {"gate_passed": leg.leg.gate.passed, "gate_difference": leg.leg.gate.difference}
            if leg.measured is not None and point.job is not None:
                row |= _numbers(leg.measured, point.job)
            writer.writerow({key: _cell(value) for key, value in row.items()})
    return out.getvalue()


def _cell(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _what(point: PointRecord) -> dict[str, object]:
    if point.point is None:
        return {}
    names = ("model", "target", "isl", "osl", "concurrency", "tp", "ep", "dp_attention")
    return {name: getattr(point.point, name) for name in names}


def _verdict(record: RunRecord, name: str) -> dict[str, object]:
    verdict = record.verdicts.get(name)
    if verdict is None:
        return {}
    return {"verdict": verdict.word.value, "effect": verdict.effect, "effect_low": verdict.low,
            "effect_high": verdict.high, "p_adjusted": verdict.adjusted}  # fmt: skip


def _numbers(measured: MeasuredLoad, job: PointJob) -> dict[str, object]:
    gpus = max(job.point.tp, 1)
    row: dict[str, object] = {
        "gpus": job.gpus,
        "completed": measured.completed,
        "failed": measured.failed,
        "duration_s": measured.duration,
        "total_tokens_per_s": measured.total_throughput,
        "output_tokens_per_s": measured.output_throughput,
        "total_tokens_per_s_per_gpu": measured.total_throughput / gpus,
        "tokens_per_s_per_user": measured.per_user,
        "steady_total_tokens_per_s": None if measured.steady is None else measured.steady.total,
    }
    for short, spread in measured.spreads.items():
        if spread is not None:
            row |= {f"{name}_{short}_ms": 1e3 * _of(spread, name) for name in ("mean", "median", "p90", "p99")}
    return row
