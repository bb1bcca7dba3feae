"""What the tools share that time our experts inside a server's own layer on one GPU: budget, record, points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from epfuse.bench import machine, roofs
from epfuse.bench.contender import Contender
from epfuse.bench.measure import Sampling
from epfuse.bench.record import BenchRecord
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.bench.run import BenchPlan, run_points
from epfuse.bench.weights import LayerWeights
from epfuse.report.write import write_atomic

UNIFORM, SAMPLING = Routing(RoutingKind.UNIFORM), Sampling(samples=9, seconds=0.01)


def the_gpu() -> torch.device:
    """The current one.

    Raises:
        click.UsageError: there is none.
    """
    if not torch.cuda.is_available():
        raise click.UsageError("there is no GPU that torch can use")
    return torch.device("cuda", torch.cuda.current_device())


def timed(
    weights: LayerWeights,
    contenders: Sequence[Contender],
    tokens: Sequence[int],
    last_begin: float,
    run: dict[str, Any],
    save: Callable[[BenchRecord], None],
) -> BenchRecord:
    """The record of all points that are begun in time; only then it is complete.

    Args:
        weights: of the layer.
        contenders: ours and the server's.
        tokens: the counts to time.
        last_begin: `time.monotonic` after which no point is begun.
        run: `machine.run_facts`; the clocks are added.
        save: called with the record after every point.
    """
    device, layer = weights.device, weights.layer
    rates = roofs.measure_roofs(device, SAMPLING)
    record = BenchRecord(
        layer=layer,
        device=machine.describe_device(device),
        roofs=rates,
        notes={f"{each.name} {each.weights}": each.note for each in contenders},
        run={**run, "clocks": {"after the roofs": machine.read_clocks(device)}},
        complete=False,
    )
    for count in tokens:
        if time.monotonic() > last_begin:
            click.echo(f"not timed, for want of time: T={count} and above", err=True)
            return record
        click.echo(f"timing T={count}", err=True)
        for rows in run_points(BenchPlan(layer, (count,), (UNIFORM,), device, 0, SAMPLING), weights, contenders, rates):
            record.rows.extend(rows)
        save(record)
    record = replace(record, complete=True)
    save(record)
    return record


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """A record's file; None for none."""
    if file is not None:
        write_atomic(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
