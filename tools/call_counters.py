"""Read hardware counters and durations of every kernel of a call, one layer of MiniMax-M3 under EP8, into a record.

    python -m tools.call_counters RECORD --points w8a16@1,16,256,1024 --points w8a8@4096,8192 --seconds 150
    python -m tools.call_counters RECORD --table

Durations are from PyTorch's profiler, with the kernels one behind the other as a call launches them. Counters are from
Nsight Compute (``ncu``), which runs each kernel alone, once for each group of counters. Up to 64 tokens it empties the
caches before, since a kernel's second run would find in L2 what a call reads from memory. Where the driver lets nobody
read counters, the record has durations alone and says what ncu said. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import functools
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import click
import torch

from epfuse import fused_experts
from epfuse.bench.inputs import Inputs, cache_bytes_of, draw_inputs
from epfuse.bench.layers import LAYERS
from epfuse.bench.machine import commit, versions
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.bench.weights import LayerWeights
from epfuse.cli.exits import PlainCommand
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic

LAYER = LAYERS["minimax-m3-ep8"]
FORMATS = {
    "w8a16": WeightFormat.FRAGMENT,
    "w8a8": WeightFormat.ROW_FP8,
    "bf16": WeightFormat.DENSE,
    "block_fp8": WeightFormat.BLOCK_FP8,
}
CACHED = 64
"""Tokens up to which the caches are emptied before each run of a kernel."""
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "read_mb": ("dram__bytes_read.sum", 1e-6),
    "written_mb": ("dram__bytes_write.sum", 1e-6),
    "memory_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "l2_percent": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct", 1.0),
    "tensor_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1.0),
    "active_cycles": ("sm__cycles_active.avg", 1.0),
    "cycles": ("sm__cycles_elapsed.max", 1.0),
}
"""Name in the record -> ncu's, and what its base unit is multiplied with."""
ON_THE_GPU = ("kernel", "gpu_memset", "gpu_memcpy")
"""What PyTorch's traces call what runs there."""
MARKER = "erfinv"
"""The function whose kernel stands before each call."""


def calls_of(path: str, tokens: int, weights: LayerWeights) -> list[tuple[Inputs, Callable[[], torch.Tensor]]]:
    """Calls on ``path`` with different routings."""
    form = weights.in_format(FORMATS[path])
    device = weights.device
    drawn = draw_inputs(LAYER, Routing(RoutingKind.UNIFORM), tokens, 0, device, cache_bytes_of(device))

    def call_with(one: Inputs) -> Callable[[], torch.Tensor]:
        return lambda: fused_experts(
            one.hidden, form, one.topk_weights, one.topk_ids, one.expert_map,
            activation=LAYER.activation, path=Path(path),
        )  # fmt: skip

    return [(one, call_with(one)) for one in drawn]


def launch(path: str, counts: list[int], trace: bool) -> list[dict[str, Any]]:
    """Run one call of each count between markers, for ncu, or under PyTorch's profiler: its kernels' durations."""
    weights = LayerWeights(LAYER, 0, torch.device("cuda", torch.cuda.current_device()))
    found, one = [], torch.zeros(1, device=weights.device)
    for count in counts:
        calls = calls_of(path, count, weights)
        for _, call in (calls * 3)[:6]:  # compiles, and watches launches
            call()
        torch.cuda.synchronize()
        inputs = calls[0][0]
        found.append({"tokens": count, "rows": inputs.rows, "active": len(inputs.active)})
        if trace:
            found[-1]["durations"] = durations([call for _, call in calls])
            continue
        torch.cuda.profiler.start()
        torch.erfinv(one)
        calls[0][1]()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return found


def durations(calls: list[Callable[[], torch.Tensor]], rounds: int = 9) -> list[dict[str, Any]]:
    """Each kernel's median microseconds in the first of ``calls``, which run in turn, and the gap before it."""
    seen: list[list[tuple[str, float, float]]] = []
    in_turn = calls[1:3] + calls[:1]
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in in_turn:
                call()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = pathlib.Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        ran = [(one["name"], one["ts"], one["ts"] + one["dur"]) for one in events if one.get("cat") in ON_THE_GPU]
        ran.sort(key=lambda one: one[1])
        seen.append(ran[-(len(ran) // len(in_turn)) :])
    if len({tuple(name for name, _, _ in one) for one in seen}) != 1:
        return [{"kernel": "calls launched different kernels", "us": 0.0, "gap_us": 0.0}]
    kernels = []
    for index, (name, _, _) in enumerate(seen[0]):
        gaps = [one[index][1] - one[index - 1][2] if index else 0.0 for one in seen]
        lasted = [one[index][2] - one[index][1] for one in seen]
        middle, gap = statistics.median(lasted), statistics.median(gaps)
        kernels.append({"kernel": short(name), "us": round(middle, 2), "gap_us": round(gap, 2)})
    return kernels


def short(name: str) -> str:
    """A kernel's name without what C++ puts around it."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"<.*|\(.*", "", plain).split("::")[-1].strip()


@functools.cache
def known_metrics(ncu: str) -> dict[str, tuple[str, float]]:
    """Those of `METRICS` that this ncu has for the GPU; all of them if it doesn't say."""
    try:
        asked = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=30, check=False).stdout
    except subprocess.TimeoutExpired:
        asked = ""
    names = set(re.findall(r"^(\w+__\w+)", asked, re.M))
    return {key: value for key, value in METRICS.items() if not names or value[0].split(".")[0] in names}


def read_counters(text: str, metrics: dict[str, tuple[str, float]]) -> list[list[dict[str, Any]]]:
    """Kernels between markers, of what ``ncu --csv --page raw --print-units base`` prints.

    Raises:
        ConfigError: there is no table in it.
    """
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith('"ID",')), None)
    if first is None:
        raise ConfigError("ncu printed no table")
    calls: list[list[dict[str, Any]]] = []
    for row in csv.DictReader(lines[first:]):
        if not row["ID"]:  # the line of units
            continue
        if MARKER in row["Kernel Name"]:
            calls.append([])
        elif calls:
            found: dict[str, Any] = {"kernel": short(row["Kernel Name"])}
            for key, (name, factor) in metrics.items():
                try:
                    found[key] = float(f"{float(row[name].replace(',', '')) * factor:.4g}")
                except (KeyError, ValueError):
                    continue
            calls[-1].append(found)
    return calls


def counted(path: str, counts: list[int], seconds: float) -> list[list[dict[str, Any]]]:
    """Counters of each count's call.

    Raises:
        ConfigError: ncu is not there, did not end in time, or read nothing; the message has its last words.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ConfigError("ncu is not on the PATH")
    metrics = known_metrics(ncu)
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "ncu.csv"
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
            "--profile-from-start", "off", "--clock-control", "none",
            "--cache-control", "all" if max(counts) <= CACHED else "none",
            "--metrics", ",".join(name for name, _ in metrics.values()),
            sys.executable, "-m", "tools.call_counters", "-", "--launch", f"{path}@{','.join(map(str, counts))}",
        ]  # fmt: skip
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            words = f"{ended.stdout} {ended.stderr}"
        except subprocess.TimeoutExpired:
            words = f"ended after {seconds:.0f} s"
        text = log.read_text() if log.exists() else ""
    try:
        calls = read_counters(text, metrics)
    except ConfigError as error:
        raise ConfigError(f"{error}: {' '.join((text + words).split())[-600:]}") from None
    if len(calls) < len(counts):
        click.echo(f"{path}: counters of {len(calls)} of {len(counts)} calls; {words[-300:]}", err=True)
    return calls


def table_of(record: dict[str, Any]) -> str:
    """Markdown: of each path and count all kernels' durations, and the counters of those that take a tenth or more."""
    names = ("read_mb", "written_mb", "memory_percent", "l2_hit_percent", "tensor_percent", "issue_percent")
    head = ["path", "tokens", "rows", "kernels, us", "GEMM", "us", *names, "SMs busy, %"]
    lines = [head, ["---"] * len(head)]
    for point in record["points"]:
        kernels = ", ".join(f"{one['kernel']} {one['us']:.1f}" for one in point.get("durations", ()))
        first = [point["path"], str(point["tokens"]), str(point["rows"]), kernels]
        counters = point.get("counters", [])
        most = max((one["us"] for one in counters), default=0.0)
        large = [one for one in counters if one["us"] >= most / 10]
        for one in large or [{}]:
            values = [f"{one[name]:.4g}" if name in one else "-" for name in ("us", *names)]
            busy = f"{100 * one['active_cycles'] / one['cycles']:.1f}" if "cycles" in one else "-"
            lines.append([*first, one.get("kernel", "-"), *values, busy])
            first = [""] * 4
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_points(values: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    """``w8a16@1,16`` -> path and counts.

    Raises:
        click.UsageError: it says something else.
    """
    found = []
    for value in values:
        path, _, counts = value.partition("@")
        if path not in FORMATS or not re.fullmatch(r"\d+(,\d+)*", counts):
            raise click.UsageError(f"{value!r} is no path and token counts such as w8a16@1,16")
        found.append((path, [int(count) for count in counts.split(",")]))
    return found


@click.command(cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", type=click.Path(dir_okay=False, path_type=pathlib.Path))
@click.option("--points", multiple=True, help="A path and token counts such as w8a16@1,16; several.")
@click.option("--seconds", type=click.FloatRange(min=1), default=150, show_default=True, help="Begin nothing after it.")
@click.option("--table", is_flag=True, help="Print RECORD as Markdown; nothing is run.")
@click.option("--launch", "launched", hidden=True, help="What ncu runs.")
@click.option("--trace", "traced", hidden=True, help="The same under PyTorch's profiler.")
def main(
    record: pathlib.Path, points: tuple[str, ...], seconds: float, table: bool, launched: str | None, traced: str | None
) -> None:
    """Write RECORD."""
    if table:
        click.echo(table_of(json.loads(record.read_text())), nl=False)
        return
    if launched or traced:
        ((path, counts),) = parse_points((launched or traced or "",))
        click.echo(json.dumps(launch(path, counts, trace=bool(traced))))
        return
    begun, installed, code = time.monotonic(), versions(), commit()
    found: list[dict[str, Any]] = []
    content = {
        "device": torch.cuda.get_device_name(),
        "torch": installed["torch"],
        "triton": installed["triton"],
        "epfuse": None if code is None else code["hash"][:7] + (", changed" if code["changed"] else ""),
        "layer": LAYER.name,
        "metrics": {key: name for key, (name, _) in METRICS.items()},
        "ncu": None,
        "points": found,
    }

    def keep() -> None:
        write_atomic(record, json.dumps(content, indent=1) + "\n")

    def left() -> float:
        return seconds - (time.monotonic() - begun)

    for path, counts in parse_points(points):
        if left() < 15:
            click.echo(f"no time for {path}", err=True)
            continue
        command = [sys.executable, "-m", "tools.call_counters", "-", "--trace", f"{path}@{','.join(map(str, counts))}"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=left(), check=True)
        except subprocess.SubprocessError as error:
            click.echo(f"{path}, durations: {error} {(getattr(error, 'stderr', None) or '')[-500:]}", err=True)
            continue
        own = [{"path": path, **point} for point in json.loads(ended.stdout.splitlines()[-1])]
        found += own
        keep()
        for part in ([one for one in own if one["tokens"] <= CACHED], [one for one in own if one["tokens"] > CACHED]):
            if not part or left() < 15 or content["ncu"]:
                continue
            try:
                read = counted(path, [one["tokens"] for one in part], left())
            except ConfigError as error:
                content["ncu"] = str(error)
                click.echo(str(error), err=True)
                continue
            for one, kernels in zip(part, read, strict=False):
                one["counters"] = kernels
            keep()
        click.echo(f"{path}: {time.monotonic() - begun:.0f} s", err=True)
    keep()
    click.echo(table_of(content), nl=False)


if __name__ == "__main__":
    main()
