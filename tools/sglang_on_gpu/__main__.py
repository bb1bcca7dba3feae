"""``python3 -m tools.sglang_on_gpu``."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import click
import torch
from tools.layer_on_gpu import the_gpu, timed, write_json

from epfuse.bench.record import BenchRecord
from epfuse.cli.exits import EXIT_CHECK_FAILED

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
    end = time.monotonic() + budget
    record = measure(QUICK_TOKENS if quick else TOKENS, the_gpu(), end, json_file)
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
    from epfuse.bench.weights import LayerWeights
    from epfuse.integrations.sglang import releases
    from epfuse.target import on_device

    layer = LAYERS[LAYER]
    install_plugin()
    with on_device(device), first_rank(layer, max(tokens)):
        click.echo("building SGLang's layers; ours compile their kernels", err=True)
        weights = LayerWeights(layer, 0, device)
        run = machine.run_facts(["python3", "-m", "tools.sglang_on_gpu"], seed=0)
        run["versions"]["sglang"] = releases.installed()
        run["stood in for"] = list(missing)
        save = partial(_write, json_file)
        return timed(weights, contenders(weights), tokens, end - RESERVE, run, save)


def report(record: BenchRecord) -> None:
    """The table on stdout, and what failed."""
    from epfuse.bench.console import print_record
    from epfuse.report.terminal import stdout

    print_record(record, None, stdout(120))


def _write(json_file: Path | None, record: BenchRecord) -> None:
    write_json(json_file, record.to_json())


if __name__ == "__main__":
    main()
