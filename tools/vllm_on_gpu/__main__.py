"""``python3 -m tools.vllm_on_gpu``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from tools.layer_on_gpu import UNIFORM, the_gpu, timed, write_json

from epfuse.bench.record import BenchRecord
from epfuse.cli.names import token_counts

if TYPE_CHECKING:
    from tools.vllm_on_gpu.checks import OracleCheck
    from tools.vllm_on_gpu.kernels import ExpertsCandidate

    from epfuse.bench.layers import Layer

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

FORMAT = "epfuse-vllm-on-gpu-1"
RELEASE = "0.25.1"
TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 8192)
QUICK_TOKENS = (1, 64, 1024)
ODD_TOKENS = 37  # is checked besides: no multiple of any tile
NAMES = ("minimax-m3-ep8", "gpt-oss-20b-biases", "gpt-oss-120b-biases")
RESERVE = 6.0  # seconds that the slowest point may take
WIDTH = 120


@dataclass
class RunFindings:
    """What a run has found so far.

    Attributes:
        checks: in the order in which they were made.
        record: the timings; None before the first.
        seconds: of its parts.
        left_out: token counts for which there was no time.
    """

    checks: list[OracleCheck] = field(default_factory=list)
    record: BenchRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check passed and no result that was to be timed was wrong or missing."""
        timed = self.record is not None and all(row.time is not None for row in self.record.rows)
        return bool(self.checks) and all(check.ok for check in self.checks) and timed

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format": FORMAT,
            "ok": self.ok,
            "checks": list(map(asdict, self.checks)),
            "bench": None if self.record is None else self.record.to_json(),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "left_out": self.left_out,
        }


@click.command()
@click.option("--layer", type=click.Choice(NAMES), default=NAMES[0], show_default=True, help="Of `epfuse bench`.")
@click.option(
    "--tokens", default=",".join(map(str, TOKENS)), show_default=True, callback=token_counts, help="Counts T."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option("--quick", is_flag=True, help=f"Only T = {', '.join(map(str, QUICK_TOKENS))}.")
@click.option(
    "--budget", type=float, default=115.0, show_default=True, help="Seconds; no new point is begun that may exceed it."
)
def main(layer: str, tokens: tuple[int, ...], json_file: Path | None, quick: bool, budget: float) -> None:
    """Check and time our experts and vLLM 0.25.1's own inside vLLM's modular kernel, on one GPU.

    The layer is MiniMax-M3's on one of eight expert-parallel ranks, or gpt-oss's with its biases, whole, in BF16. A
    class whose result is wrong gets no time.

    Exit status: 0 good; 1 a check failed or a class could not be timed; 2 usage, or no GPU or vLLM to run on.
    """
    began = time.monotonic()
    counts = QUICK_TOKENS if quick and tokens == TOKENS else tokens
    run = RunFindings()
    measure(run, layer, counts, _device(), began + budget, json_file)
    run.seconds["all"] = time.monotonic() - began
    write_json(json_file, run.to_json())
    report(run)
    sys.exit(0 if run.ok else 1)


def measure(
    run: RunFindings, name: str, tokens: tuple[int, ...], device: torch.device, end: float, json_file: Path | None
) -> None:
    """All checks, then all timings, into ``run``; the file is written after every point.

    Args:
        run: filled.
        name: of the layer.
        tokens: the counts to time.
        device: a GPU.
        end: `time.monotonic` after which nothing new is begun.
        json_file: None for none.
    """
    from tools.vllm_on_gpu.checks import Cases, check_candidate, reserve_workspaces

    from epfuse.bench import machine
    from epfuse.bench.inputs import cache_bytes_of, draw_inputs
    from epfuse.bench.layers import LAYERS
    from epfuse.target import on_device

    def save(record: BenchRecord) -> None:
        run.record = record
        write_json(json_file, run.to_json())

    layer = LAYERS[name]
    began = time.monotonic()
    with on_device(device):
        weights, candidates = _candidates(layer, device, max(*tokens, ODD_TOKENS))
        most = draw_inputs(layer, UNIFORM, max(tokens), 0, device, cache_bytes_of(device))[0]
        reserve_workspaces(candidates, most)
        run.seconds["load"] = time.monotonic() - began
        began = time.monotonic()
        for count in sorted({*tokens, ODD_TOKENS}):
            click.echo(f"checking T={count}", err=True)
            cases = Cases.of(draw_inputs(layer, UNIFORM, count, 1, device, 0), weights)
            for candidate in candidates:
                run.checks += check_candidate(candidate, cases)
        run.seconds["check"] = time.monotonic() - began
        write_json(json_file, run.to_json())
        began = time.monotonic()
        facts = machine.run_facts(["python3", "-m", "tools.vllm_on_gpu"], seed=0)
        contenders = [candidate.contender() for candidate in candidates]
        run.record = timed(weights, contenders, tokens, end - RESERVE, facts, save)
        timed_counts = {row.tokens for row in run.record.rows}
        run.left_out = [count for count in tokens if count not in timed_counts]
        run.seconds["time"] = time.monotonic() - began


def report(run: RunFindings) -> None:
    """The tables on stdout."""
    from epfuse.bench.console import print_record
    from epfuse.report.terminal import figures, make_table, stdout

    console, counts = stdout(WIDTH), sorted({check.tokens for check in run.checks})
    numbers = (figures(f"T={count}") for count in counts)
    table = make_table("experts", "how", *numbers, title="relative error against float64")
    cells = {(check.experts, check.what, check.tokens): check for check in run.checks}
    for experts, what in dict.fromkeys((check.experts, check.what) for check in run.checks):
        table.add_row(experts, what, *(_cell(cells.get((experts, what, count))) for count in counts))
    console.print(table)
    for check in run.checks:
        if check.failure is not None:
            where = f"{check.experts}, T={check.tokens}, {check.what}"
            console.print(f"FAIL: {where}: {check.failure}", markup=False, highlight=False)
    if run.record is not None:
        print_record(run.record, None, console)
    for count in run.left_out:
        console.print(f"not timed, for want of time: T={count}", highlight=False)
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in run.seconds.items())
    passed = sum(check.ok for check in run.checks)
    console.print(f"{passed} of {len(run.checks)} checks passed; {parts}", highlight=False)


def _cell(check: OracleCheck | None) -> str:
    if check is None:
        return "-"
    error = "?" if check.relative_error is None else f"{check.relative_error:.1e}"
    return error if check.ok else f"[bold red]{error}[/]"


def _candidates(layer: Layer, device: torch.device, max_tokens: int) -> tuple[Any, list[ExpertsCandidate]]:
    """The layer's weights, and everyone ready to be called in vLLM's workspaces."""
    from tools.vllm_on_gpu.kernels import Builder
    from vllm.v1.worker import workspace

    from epfuse.bench.weights import LayerWeights
    from epfuse.target import target_of

    workspace.init_workspace_manager(device)
    weights = LayerWeights(layer, 0, device)
    return weights, Builder(weights, target_of(device), max_tokens).all()


def _device() -> torch.device:
    """The GPU.

    Raises:
        click.UsageError: there is none, or no vLLM of the release that this was written for.
    """
    from epfuse.integrations.vllm import releases

    gpu = the_gpu()
    found = releases.installed().partition("+")[0]
    if found != RELEASE:
        raise click.UsageError(f"the vLLM on the path is {found}; this needs {RELEASE}")
    return gpu


if __name__ == "__main__":
    main()
