"""What ``epfuse tune`` does, once its options are known to make sense; the part that needs torch and Triton."""

from __future__ import annotations

import json
import pathlib
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click
import torch
import triton
from rich.progress import Progress

from epfuse.bench import machine
from epfuse.bench.layers import Layer
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.device import choose_device
from epfuse.config import Path
from epfuse.errors import ConfigError, DeviceError, TuningError
from epfuse.measured import store
from epfuse.report.terminal import bars, stdout
from epfuse.target import device_name, target_of
from epfuse.tuning import console, vllm_files
from epfuse.tuning.run import Device, TuningRequest, pending, plan_of, run, write_rows
from epfuse.tuning.search import TuningOutcome, TuningPlan, without
from epfuse.tuning.space import Space
from epfuse.tuning.trials import Trial, keep_fastest, plans_of, run_trials

if TYPE_CHECKING:
    from epfuse.tuning.bench import DeviceBench


@dataclass(frozen=True)
class Options:
    """Of both ways to run.

    Attributes:
        device: cuda or cuda:N.
        folder: of tables; None for epfuse's own.
        seed: of the inputs.
        workers: compiling processes.
        as_json: whether JSON is printed in place of tables.
    """

    device: str
    folder: pathlib.Path | None
    seed: int
    workers: int
    as_json: bool


def search_layers(
    options: Options,
    layers: list[Layer],
    paths: tuple[Path, ...],
    tokens: tuple[int, ...],
    space: Space,
    part: tuple[int, int],
    again: bool,
    budget: int,
    from_vllm: pathlib.Path | None,
    to_vllm: pathlib.Path | None,
) -> None:
    """Search the tiles of every layer, print what was found, and exit."""
    gpu, found = _device(options)
    folder = store.TABLES if options.folder is None else options.folder
    delivery = Delivery(folders={"--out": folder, "--to-vllm": to_vllm})
    store.check_tables(folder, found.target)
    jobs = []
    for layer in layers:
        extra = () if from_vllm is None else tuple(vllm_files.read(from_vllm, layer.shape).items())
        request = TuningRequest(found, layer.shape, paths, tokens, folder, _command(), extra, space, layer.bias)
        points = request.points()[part[0] - 1 :: part[1]] if again else pending(request, part)
        jobs.append(LayerJob(layer, request, [plan_of(request, point) for point in points]))
    _search(jobs, gpu, options, budget, delivery)
    with delivery.of(STDOUT):
        _show(jobs, options.as_json)
    if to_vllm is not None:
        with delivery.of("--to-vllm"):
            _write_vllm(to_vllm, jobs[0].request, jobs[0].outcomes)
    delivery.exit(passed=True)


def _show(jobs: list[LayerJob], as_json: bool) -> None:
    if as_json:
        values = [{"shape": job.layer.name} | console.to_json(outcome) for job in jobs for outcome in job.outcomes]
        click.echo(json.dumps(values, indent=2, allow_nan=False))
        return
    screen = stdout(160)
    for job in jobs:
        console.show(job.request, job.outcomes, len(job.plans), screen)


@dataclass
class LayerJob:
    """One layer's part of a run."""

    layer: Layer
    request: TuningRequest
    plans: list[TuningPlan]
    outcomes: list[TuningOutcome] = field(default_factory=list)


def _search(jobs: list[LayerJob], gpu: torch.device, options: Options, budget: int, delivery: Delivery) -> None:
    """Compile what all layers try, then search them one after another; the time goes by how much each has to try."""
    from epfuse.tuning.prune import candidates_of, distinct, unfit

    def write(*rows: Any) -> None:
        with delivery.of("the tables"):  # a full disk costs no result: what was found is still shown at the end
            write_rows(*rows)

    begun = time.monotonic()
    with bars(time_left=True) as progress:
        watch = console.ProgressWatch(progress)
        tries = [[candidates_of(job.request, plan) for plan in job.plans] for job in jobs]
        compiling = distinct(candidate for plans in tries for plan in plans for candidate in plan)
        found = unfit(compiling, options.workers, watch.compiled) if compiling else {}
        watch.pruned(len(found), len(compiling))
        dropped = {candidate.code for candidate in found}
        compiled = time.monotonic() - begun
        if compiling and compiled >= budget:
            raise TuningError(
                f"--budget is {budget} s and compiling took {compiled:.0f} s of it; Triton's cache has the tiles now:"
                " run the command again, or give it more"
            )
        to_do = sum(plan.steps for job in jobs for plan in job.plans)
        for job, candidates in zip(jobs, tries, strict=True):
            plans = [
                without(plan, {(c.stage, c.block_m, c.tile) for c in tried if c.code in dropped})
                for plan, tried in zip(job.plans, candidates, strict=True)
            ]
            left = budget - (time.monotonic() - begun)
            steps = sum(plan.steps for plan in job.plans)
            share = left * steps / max(to_do, 1)
            bench = _bench(job.layer, gpu, options.seed, progress)
            job.outcomes = run(job.request, plans, bench, watch, share, time.monotonic, write)
            to_do -= steps
            torch.cuda.empty_cache()  # the next layer's weights may need it


def try_tiles(options: Options, layer: Layer, trials: tuple[Trial, ...], keep: bool) -> None:
    """Judge and time trials, print what came of them, and exit."""
    from epfuse.tuning.prune import candidates_of, distinct, unfit

    gpu, device = _device(options)
    folder = store.TABLES if options.folder is None else options.folder
    delivery = Delivery(folders={"--out": folder if keep else None})
    if keep:
        store.check_tables(folder, device.target)
    request = TuningRequest(device, layer.shape, (), (), folder, _command(), bias=layer.bias)
    with bars(time_left=True) as progress:
        watch = console.ProgressWatch(progress)
        plans = plans_of(trials, device.target)
        compiling = distinct(candidate for plan in plans for candidate in candidates_of(request, plan))
        unfit(compiling, options.workers, watch.compiled)  # for the cache: a tile that spills is timed all the same
        task = progress.add_task("timing", total=len(trials))
        bench = _bench(layer, gpu, options.seed, progress)
        results = run_trials(trials, device.target, bench, lambda result: progress.advance(task))
    with delivery.of(STDOUT):
        if options.as_json:
            record = machine.run_facts(
                ["epfuse"],
                device=machine.describe_device(gpu),
                clocks=machine.read_clocks(gpu),
                shape=asdict(layer.shape),
                bias=layer.bias.value,
                trials=[result.to_json() for result in results],
            )
            click.echo(json.dumps(record, indent=1, allow_nan=False))
        else:
            console.show_results(results, device, stdout(160))
    if keep:
        with delivery.of("the tables"):
            kept = keep_fastest(request, results)
            click.echo(f"{kept} of {len(results)} trials written to {folder / device.target.value}", err=True)
    delivery.exit(passed=all(result.fault is None for result in results))


def _bench(layer: Layer, gpu: torch.device, seed: int, progress: Progress) -> DeviceBench:
    """What times the layer; a line above the bars says when it makes weights, which takes seconds."""
    from epfuse.tuning.bench import DeviceBench

    return DeviceBench(layer, gpu, seed=seed, say=lambda what: progress.console.print(what, highlight=False))


def _device(options: Options) -> tuple[torch.device, Device]:
    """The GPU, which becomes the current one, and what measures on it."""
    gpu = _gpu(options.device)
    return gpu, Device(target_of(gpu), device_name(gpu), torch.__version__, triton.__version__)


def _gpu(name: str) -> torch.device:
    try:
        gpu = choose_device(name)
    except DeviceError as error:
        raise DeviceError(f"{error}; tiles are searched on a GPU") from None
    if gpu.type != "cuda":
        raise DeviceError(f"device is {name!r}; tiles are searched on a GPU: cuda or cuda:N")
    torch.cuda.set_device(gpu)
    return gpu


def _write_vllm(folder: pathlib.Path, request: TuningRequest, outcomes: list[TuningOutcome]) -> None:
    tiles = {outcome.point.tokens: outcome.tiles for outcome in outcomes if outcome.point.path is Path.BF16}
    if not tiles:
        raise ConfigError("--to-vllm writes the BF16 path's tiles, and none was tuned in this run")
    name = vllm_files.file_name(request.shape, request.device.name)
    click.echo(f"wrote {vllm_files.write(folder, name, tiles, request.device.triton)}", err=True)


def _command() -> str:
    return shlex.join(["epfuse", *sys.argv[1:]])
