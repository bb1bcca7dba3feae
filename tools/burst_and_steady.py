"""Time one layer of MiniMax-M3 under EP8 in short bursts after rest, and for seconds, where the power limit holds.

    python -m tools.burst_and_steady RECORD --paths w8a16,w8a8 --tokens 1024,2048,4096,8192,16384

A burst is 40 ms of calls in CUDA graphs after a second of rest, the median of three. Then the same graph runs for
seconds; its time is that of the last one. nvidia-smi says every 50 ms what the card drew and how fast it ran.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tools.call_counters import LAYER, calls_of

from epfuse.bench.machine import commit, versions
from epfuse.bench.weights import LayerWeights
from epfuse.children import Children
from epfuse.cli.exits import PlainCommand
from epfuse.cli.names import comma_names, token_counts
from epfuse.report.write import write_atomic

BURST, REST, BURSTS = 0.04, 1.0, 3
ASKED = ("timestamp", "clocks.sm", "power.draw.instant", "temperature.gpu", "clocks_event_reasons.active")


def graph_of(calls: list[Callable[[], torch.Tensor]], seconds: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of calls in turn that takes about so long, and how many."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # weights come from another stream
    with torch.cuda.stream(stream):
        for call in calls * 3:
            call()
        torch.cuda.synchronize()
        begun = time.monotonic()
        for call in calls * 4:
            call()
        torch.cuda.synchronize()
        each = (time.monotonic() - begun) / (4 * len(calls))
        rounds = max(1, round(seconds / each / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls * rounds:
                call()
    return graph, rounds * len(calls)


def replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Milliseconds of so many replays."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(times):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def samples_of(lines: list[str]) -> dict[str, Any]:
    """The median clock, power and temperature of nvidia-smi's lines, and the reasons that it named."""
    clocks, power, heat, reasons = [], [], [], set()
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(ASKED):
            continue
        try:
            values = [float(cell) for cell in cells[1:4]]
        except ValueError:  # nvidia-smi has no such number here
            continue
        clocks.append(values[0])
        power.append(values[1])
        heat.append(values[2])
        reasons.add(cells[4])
    if not clocks:
        return {"samples": 0}
    return {
        "samples": len(clocks),
        "mhz": statistics.median(clocks),
        "watts": statistics.median(power),
        "most_watts": max(power),
        "celsius": statistics.median(heat),
        "reasons": sorted(reasons),
    }


def name_of(device: torch.device) -> str:
    """What nvidia-smi calls a device: its own numbers are not those of CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def watched(device: str, run: Callable[[], float]) -> tuple[float, dict[str, Any]]:
    """What ``run`` returns, and what nvidia-smi saw of a device in its last half."""
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    with (
        Children() as children,
        subprocess.Popen(
            [*command, "-lms", "50"], stdout=subprocess.PIPE, text=True, process_group=children.id
        ) as process,
    ):
        found = run()
        children.end()
        lines = process.communicate()[0].splitlines()
    return found, samples_of(lines[len(lines) // 2 :])


def measure(path: str, tokens: int, weights: LayerWeights, steady: float) -> dict[str, Any]:
    """One row."""
    drawn = calls_of(path, tokens, weights)
    graph, calls = graph_of([call for _, call in drawn], BURST / 2)
    replay(graph, 2)
    bursts = []
    for _ in range(BURSTS):
        time.sleep(REST)
        bursts.append(replay(graph, 2) / 2 / calls * 1e3)
    time.sleep(REST)
    took = bursts[-1] * calls * 1e-6  # seconds of a replay
    last = max(1, round(1.0 / took))

    def long_run() -> float:
        replay(graph, max(1, round((steady - 1.0) / took)))
        return replay(graph, last) / last / calls * 1e3

    microseconds, seen = watched(name_of(weights.device), long_run)
    return {
        "path": path,
        "tokens": tokens,
        "rows": drawn[0][0].rows,
        "burst_us": round(statistics.median(bursts), 1),
        "bursts_us": [round(us, 1) for us in bursts],
        "steady_us": round(microseconds, 1),
        "steady": seen,
    }


@click.command(cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--paths", callback=comma_names(("w8a16", "w8a8", "bf16", "block_fp8")), default="w8a16")
@click.option("--tokens", callback=token_counts, default="1024,2048,4096,8192,16384", show_default=True)
@click.option("--steady", type=click.FloatRange(min=1.5), default=3.0, show_default=True, help="Seconds of a long run.")
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True, help="Begin nothing after it.")
def main(record: Path, paths: tuple[str, ...], tokens: tuple[int, ...], steady: float, seconds: float) -> None:
    """Write RECORD."""
    begun, installed, code = time.monotonic(), versions(), commit()
    weights = LayerWeights(LAYER, 0, torch.device("cuda", torch.cuda.current_device()))
    ask = ["nvidia-smi", f"--id={name_of(weights.device)}", "--query-gpu=power.limit", "--format=csv,noheader"]
    limit = subprocess.run(ask, capture_output=True, text=True, check=False)
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": installed["torch"],
        "triton": installed["triton"],
        "epfuse": None if code is None else code["hash"][:7] + (", changed" if code["changed"] else ""),
        "layer": LAYER.name,
        "power_limit": limit.stdout.strip(),
        "how": f"burst: {BURST * 1e3:.0f} ms after {REST:.0f} s of rest, median of {BURSTS}; steady: the last second of"
        f" {steady:g}",
        "rows": [],
    }
    for path in paths:
        for count in tokens:
            if time.monotonic() - begun > seconds:
                click.echo(f"no time for {path} at {count}", err=True)
                continue
            row = measure(path, count, weights, steady)
            content["rows"].append(row)
            click.echo(
                f"{path} T={count}: burst {row['burst_us']} us, steady {row['steady_us']} us,"
                f" {row['steady_us'] / row['burst_us']:.3f}; {row['steady']}"
            )
            write_atomic(record, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
