"""Time kernels of the peers' harness on many layers, each at token counts of its own: for tools/beside_peers.py.

One process times all that can share one, since importing a peer's libraries takes longer than timing its kernels. It is
started again after a kernel that failed or broke it, and ended when the time is used up. Before, several processes
compile.
"""

from __future__ import annotations

import json
import os
import pathlib
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
from tools.peer_driver import load
from tools.peer_process import PeerProcess

from epfuse.bench.layers import Layer
from epfuse.config import Path, WeightFormat
from epfuse.errors import EpfuseError
from epfuse.families.family import CallKind
from epfuse.target import Target

PATIENCE = 75.0
"""Seconds without a line after which a process that times is taken to hang: imports are less. Compiling says little."""
APART = ("humming_w8a16_grouped", "humming_w8a8_grouped")
"""Kernels of a process of their own. They load vLLM 0.33's operators, the others vLLM 0.25's, under the same names with
other arguments: where both are loaded the second library ends the process, or its import raises for good."""
WRONG = 0.1
"""A relative error from which on a time does not count, as the harness has it."""
FORMATS = {
    "w8a16": WeightFormat.FRAGMENT,
    "w8a8": WeightFormat.ROW_FP8,
    "bf16": WeightFormat.DENSE,
    "block_fp8": WeightFormat.BLOCK_FP8,
}
"""Path of ours -> what benchmarks/peer_layer.py prepares for it."""


@dataclass(frozen=True)
class PeerTask:
    """One kernel on one layer."""

    index: int
    layer: str
    kernel: str
    tokens: tuple[int, ...]
    harness: str
    environment: dict[str, str]


@dataclass(frozen=True)
class PeerLayer:
    """What each kernel of a run is timed on: a layer, its token counts, and the harness' source for it."""

    layer: Layer
    tokens: tuple[int, ...]
    source: str


def sizes_of(layer: Layer) -> dict[str, str]:
    """The harness' variables for a layer."""
    shape = layer.shape
    sizes = {"H": shape.hidden, "I": shape.intermediate, "E": shape.experts, "EL": shape.local_experts}
    return {f"PEER_{name}": str(size) for name, size in sizes.items()}


def tasks_of(
    points: Sequence[PeerLayer], kernels: Sequence[str], implementation: str, folder: pathlib.Path
) -> list[PeerTask]:
    """Layer by layer, in the order of the kernels; the first task measures the roofs."""
    found = []
    for index, point in enumerate(points):
        path = folder / f"layer{index}.py"
        path.write_text(point.source)
        environment = sizes_of(point.layer) | {"PEER_IMPL": implementation}
        names = [*(["ceiling"] if index == 0 else []), *kernels]
        found += [PeerTask(0, point.layer.name, name, point.tokens, str(path), environment) for name in names]
    return [replace(task, index=index) for index, task in enumerate(found)]


def compile_ours(points: Sequence[PeerLayer], paths: Sequence[str], jobs: int) -> str:
    """Compile what our calls will launch, side by side; a sentence about it."""
    import torch

    from epfuse.aot.launches import launches_of
    from epfuse.compiled.layer import run_calls
    from epfuse.compiled.warm_up import compile_all, missing

    if not torch.cuda.is_available():
        return "no GPU: nothing of ours is compiled beforehand"
    device, found = torch.cuda.get_device_name(), []
    for point in points:
        for path in paths:
            forms = frozenset({FORMATS[path]})
            kind = CallKind(Path(path), Target.SM90, point.layer.shape, forms, device_name=device)
            try:
                counts = list(point.tokens)
                found += launches_of(Target.SM90, lambda kind=kind, counts=counts: run_calls(kind, counts), device)
            except EpfuseError as error:
                click.echo(f"{point.layer.name}, {path}: {error}", err=True)
    wanted = missing(list(dict.fromkeys(found)))
    failed = [one.failure for one in compile_all(wanted, jobs, lambda done: None) if one.failure]
    return f"{len(wanted)} kernels of ours compiled; failed: {failed or 'none'}"


def run_tasks(
    tasks: Sequence[PeerTask],
    phase: str,
    seconds: float,
    environment: dict[str, str],
    say: Callable[[PeerTask, str], None],
) -> list[PeerTask]:
    """Run tasks, each in the process of those before it that it can share one with, until the time is up.

    A kernel that failed may have left half of a library behind, so those after it get another process.

    Args:
        tasks: in order.
        phase: of the harness, ``compile`` or ``time``.
        seconds: for all.
        environment: of the processes.
        say: called with each line of a task.

    Returns:
        Those that were not begun.
    """
    left, end = list(tasks), time.monotonic() + seconds
    processes: dict[bool, PeerProcess] = {}
    with ExitStack() as stack:
        while left and time.monotonic() < end:
            task, apart = left[0], left[0].kernel in APART
            left = left[1:]
            if apart not in processes:
                processes[apart] = PeerProcess(phase, environment)
                stack.callback(processes[apart].end)
            if not _run(task, processes[apart], PATIENCE if phase == "time" else seconds, end, say):
                processes.pop(apart).end()
    return left


def _run(
    task: PeerTask, process: PeerProcess, patience: float, end: float, say: Callable[[PeerTask, str], None]
) -> bool:
    """Whether the task ran to its end without a failure."""
    process.give(asdict(task))
    good = True
    while True:
        try:
            line = process.line(min(patience, end - time.monotonic()))
        except queue.Empty:
            why = "time is up" if time.monotonic() >= end else f"nothing for {patience:.0f} s"
        else:
            if line == "END":
                return good
            if line is not None:
                say(task, line)
                good = good and not line.startswith("FAILED")
                continue
            why = process.how_it_ended()
        say(task, f"FAILED {why}")
        return False


def surroundings(harness: pathlib.Path) -> dict[str, str]:
    """The environment that the harness gives its own processes: its peers' libraries first, and NVRTC's folders."""
    module, known = load(str(harness)), dict(os.environ)
    paths = [str(module.ROOT), *(path for path in known.get("PYTHONPATH", "").split(os.pathsep) if path)]
    libraries = [path for path in (known.get("LD_LIBRARY_PATH", ""), *module.nvrtc_dirs()) if path]
    return known | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONUNBUFFERED": "1",
        "HUMMING_MAX_PARALLEL_BUILD_WORKERS": known.get("HUMMING_MAX_PARALLEL_BUILD_WORKERS", "2"),
        "VLLM_LOGGING_LEVEL": known.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


@dataclass
class PeerTimes:
    """What a run has found so far.

    Attributes:
        roofs: the harness' line about the card.
        rows: layer -> the best configuration of each kernel at each count.
        failed: layer, kernel and what the harness said.
        left_out: layers and kernels that the time did not reach.
    """

    roofs: str
    rows: dict[str, list[dict[str, Any]]]
    failed: list[tuple[str, str, str]]
    left_out: list[tuple[str, str]]

    def take(self, task: PeerTask, line: str) -> None:
        """One line of the harness."""
        kind, _, rest = line.partition(" ")
        if kind == "ROW":
            row = json.loads(rest)
            if row["best"]:
                self.rows[task.layer].append(row)
        elif kind in ("ERR", "FAILED"):
            self.failed.append((task.layer, task.kernel, rest[:800]))
        elif kind == "NOTE" and task.kernel == "ceiling":
            self.roofs = f"ceiling    {rest}"


def _compile(
    points: Sequence[PeerLayer],
    tasks: Sequence[PeerTask],
    paths: Sequence[str],
    seconds: float,
    jobs: int,
    environment: dict[str, str],
) -> None:
    """Compile all kernels, the peers' in at most so many seconds."""
    begun = time.monotonic()
    theirs = [task for task in tasks if not task.kernel.startswith("impl") and task.kernel != "ceiling"]

    def compiled(task: PeerTask, line: str) -> None:
        if line.startswith(("CERR", "ERR", "FAILED")):
            click.echo(f"compiling {task.kernel} for {task.layer}: {line}", err=True)

    def compile_theirs(part: list[PeerTask]) -> None:
        run_tasks(part, "compile", seconds, environment, compiled)

    parts = []
    for apart in (False, True):
        some = [task for task in theirs if (task.kernel in APART) is apart]
        share = max(1, round(jobs * len(some) / max(1, len(theirs))))
        parts += [part for n in range(share) if (part := some[n::share])]
    threads = [threading.Thread(target=compile_theirs, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    click.echo(compile_ours(points, paths, jobs), err=True)
    for thread in threads:
        thread.join()
    click.echo(f"compiled in {time.monotonic() - begun:.0f} s", err=True)


def time_layers(
    points: Sequence[PeerLayer], kernels: Sequence[str], paths: Sequence[str], implementation: str, seconds: float,
    jobs: int | None, folder: pathlib.Path, keep: Callable[[PeerTimes], None],
) -> PeerTimes:  # fmt: skip
    """Compile and time ``kernels`` on every layer.

    Args:
        points: the layers.
        kernels: names of the harness' copies, ours among them.
        paths: ours, to compile beforehand.
        implementation: ours, for the harness.
        seconds: for the timing; compiling may take half of them besides.
        jobs: processes that compile; None where all kernels are in the caches already.
        folder: for temporary files.
        keep: called with what there is after each kernel's times.
    """
    tasks = tasks_of(points, kernels, implementation, folder)
    environment = surroundings(pathlib.Path(tasks[0].harness))
    if jobs is not None:
        _compile(points, tasks, paths, seconds / 2, jobs, environment)
    found = PeerTimes("", {point.layer.name: [] for point in points}, [], [])

    def said(task: PeerTask, line: str) -> None:
        click.echo(f"{task.layer} {task.kernel}: {line[: 800 if line.startswith('FAILED') else 200]}", err=True)
        found.take(task, line)
        if found.roofs:
            keep(found)

    left = run_tasks(tasks, "time", seconds, environment, said)
    found.left_out = [(task.layer, task.kernel) for task in left]
    return found


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row's time counts; one of NaN has an error that is no number."""
    return bool(row["err"] < WRONG)


def layers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each layer's part of a record; a record of one layer is its own."""
    return list(record["layers"]) if "layers" in record else [record]


def comparisons(layers: list[dict[str, Any]], ours: str) -> list[tuple[str, int, float, str | None, float]]:
    """Layer, T, microseconds of ours, the fastest peer and its microseconds, None and NaN if no peer was right."""
    found = []
    for layer in layers:
        times: dict[int, dict[str, float]] = {}
        for row in layer["rows"]:
            if is_right(row):
                times.setdefault(row["T"], {})[row["peer"]] = row["us"]
        for tokens, of_kernel in sorted(times.items()):
            peers = {peer: us for peer, us in of_kernel.items() if not peer.startswith("impl")}
            if ours in of_kernel:
                best = min(peers, key=peers.__getitem__, default=None)
                found.append((layer["layer"], tokens, of_kernel[ours], best, peers[best] if best else float("nan")))
    return found


def text_of(record: dict[str, Any], ours: str) -> str:
    """Each layer's ratios as a line of a Markdown table, then means, and what lost, failed or was not reached."""
    layers = layers_of(record)
    all_points = comparisons(layers, ours)
    lines = ["| layer | tokens: us (over the fastest peer) | mean | worst |", "| --- | --- | --- | --- |"]
    for layer in layers:
        own = [point for point in all_points if point[0] == layer["layer"]]
        cells = [f"{tokens}: {us:.1f}" + (f" ({us / least:.2f})" if peer else "") for _, tokens, us, peer, least in own]
        ratios = [us / least for _, _, us, peer, least in own if peer]
        ends = [f"{statistics.geometric_mean(ratios):.3f}", f"{max(ratios):.3f}"] if ratios else ["-", "-"]
        lines.append(f"| {layer['layer']} | {', '.join(cells)} | {' | '.join(ends)} |")
    ratios = [us / least for _, _, us, peer, least in all_points if peer]
    if ratios:
        mean, most = statistics.geometric_mean(ratios), max(ratios)
        lines += ["", f"{len(ratios)} points: geometric mean {mean:.3f}, at most {most:.3f}"]
    lost = [point for point in all_points if point[3] and point[2] > point[4]]
    for layer_name, tokens, us, peer, least in lost:
        lines.append(f"lost: {layer_name} at {tokens} tokens, {us:.1f} us for {least:.1f} of {peer}: {us / least:.3f}")
    if ratios and not lost:
        lines.append("lost: none")
    wrong = [(layer["layer"], row) for layer in layers for row in layer["rows"] if not is_right(row)]
    lines += [f"wrong: {row['peer']} on {name} at {row['T']} tokens, error {row['err']:.2g}" for name, row in wrong]
    lines += [f"failed: {kernel} on {layer_name}: {why}" for layer_name, kernel, why in record["failed"]]
    lines += [f"not reached: {kernel} on {layer_name}" for layer_name, kernel in record["left_out"]]
    return "\n".join(lines) + "\n"
