"""``python3 -m tools.sglang_on_gpu``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from epfuse.cli.exits import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    import torch

    from epfuse.bench.record import BenchRecord

TOKENS = (1, 16, 37, 64, 256, 1024, 4096, 8192)
QUICK_TOKENS = (1, 37, 64, 1024)
LAYER = "minimax-m3-ep8"
RESERVE = 8.0
"""Seconds that the slowest point may take."""


@click.command()
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option("--quick", is_flag=True, help=f"Only T = {', '.join(map(str, QUICK_TOKENS))}.")
@click.option(
    "--budget", type=float, default=150.0, show_default=True, help="Seconds; no new point is begun that may exceed it."
)
def main(json_file: Path | None, quick: bool, budget: float) -> None:
    """Check and time our runner and SGLang's Triton runner in SGLang's FusedMoE, on one GPU.

    The layer is MiniMax-M3's on one of eight expert parallel ranks. Every call is compared with float64 on poisoned
    memory, eager and replayed from a CUDA graph. A runner whose result is wrong gets no time.

    Exit status: 0 good; 1 a result was wrong, or a runner could not be timed; 2 usage, or no GPU to run on.
    """
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("there is no GPU that torch can use")
    end = time.monotonic() + budget
    record = measure(
        QUICK_TOKENS if quick else TOKENS, torch.device("cuda", torch.cuda.current_device()), end, json_file
    )
    report(record)
    timed = all(row.time is not None for row in record.rows)
    sys.exit(0 if record.rows and record.ok and timed else EXIT_CHECK_FAILED)


def measure(tokens: tuple[int, ...], device: torch.device, end: float, json_file: Path | None) -> BenchRecord:
    """All points until ``end``; the file is written after every point.

    Args:
        tokens: the counts to time.
        device: where.
        end: `time.monotonic` after which nothing new is begun.
        json_file: None for none.
    """
    from tools.sglang_on_gpu import stand_ins

    missing = stand_ins.install()
    from tools.sglang_on_gpu.layers import contenders, first_rank, install_plugin

    from epfuse.bench import machine
    from epfuse.bench.layers import LAYERS
    from epfuse.bench.measure import Sampling
    from epfuse.bench.record import BenchRecord
    from epfuse.bench.roofs import measure_roofs
    from epfuse.bench.routing import Routing, RoutingKind
    from epfuse.bench.run import BenchPlan, on_device, run_points
    from epfuse.bench.weights import LayerWeights
    from epfuse.integrations.sglang import releases

    layer, uniform, sampling = LAYERS[LAYER], Routing(RoutingKind.UNIFORM), Sampling(samples=9, seconds=0.01)
    install_plugin()
    with on_device(device), first_rank(layer, max(tokens)):
        click.echo("building SGLang's layers; ours compile their kernels", err=True)
        weights = LayerWeights(layer, 0, device)
        candidates = contenders(weights)
        roofs = measure_roofs(device, sampling)
        record = BenchRecord(
            layer=layer,
            device=machine.describe_device(device),
            roofs=roofs,
            notes={f"{each.name} {each.weights}": each.note for each in candidates},
            run={
                "command": shlex.join(["python3", "-m", "tools.sglang_on_gpu", *sys.argv[1:]]),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seed": 0,
                "commit": machine.commit(),
                "versions": machine.versions() | {"sglang": releases.installed()},
                "stood in for": list(missing),
                "clocks": {"after the roofs": machine.read_clocks(device)},
            },
            complete=False,
        )
        for count in tokens:
            if time.monotonic() + RESERVE > end:
                click.echo(f"not timed, for want of time: T={count} and above", err=True)
                return record
            click.echo(f"checking and timing T={count}", err=True)
            plan = BenchPlan(layer, (count,), (uniform,), device, 0, sampling)
            for rows in run_points(plan, weights, candidates, roofs):
                record.rows.extend(rows)
            _write(record, json_file)
    record = replace(record, complete=True)
    _write(record, json_file)
    return record


def report(record: BenchRecord) -> None:
    """The table on stdout, and what failed."""
    from epfuse.bench.console import print_record
    from epfuse.report.terminal import stdout

    print_record(record, None, stdout(120))


def _write(record: BenchRecord, json_file: Path | None) -> None:
    from epfuse.report.write import write_atomic

    if json_file is not None:
        write_atomic(json_file, json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
