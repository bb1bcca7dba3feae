"""``epfuse tune``: search tiles on the present GPU."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
import triton
from click.core import ParameterSource
from rich.console import Console

from epfuse.bench import machine
from epfuse.bench.layers import ACTIVATIONS, CUSTOM, LAYERS, Layer, make_layer
from epfuse.cli.names import comma_names, token_counts
from epfuse.config import Path as LayerPath
from epfuse.errors import ConfigError, DeviceError, TuningError
from epfuse.policy import READABLE
from epfuse.target import Target, device_name, target_of
from epfuse.tuning import console, store, vllm_files
from epfuse.tuning.run import Device, Request, pending, plan_of, run
from epfuse.tuning.search import Outcome, Plan, without
from epfuse.tuning.space import Space
from epfuse.tuning.trials import Trial, keep_fastest, plans_of, read_trials, run_trials

DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
SEARCH_OPTIONS = ("paths", "tokens", "space", "budget", "part", "again", "from_vllm", "to_vllm")
"""Parameters of `tune` that say what is searched."""
PATHS = tuple(path.value for path in READABLE[Target.GFX942])


def _part(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", value)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{value!r} is no part such as 1/4")
    return int(found[1]), int(found[2])


EPILOG = """\b
Examples:
  epfuse tune --shape minimax-m3-ep8 --tokens 64,1024 --budget 300
  epfuse tune --shape gpt-oss-120b --path bf16 --to-vllm tiles
  epfuse tune --shape minimax-m3-ep4,minimax-m3-tp8 --path w8a16 --space known
  epfuse tune --trials trials.json --json > record.json
  epfuse tune --trials trials.json --keep --out my-tables

A file of trials is a JSON list of {"path": "w8a16", "tokens": 64, "block_m": 16,
"gate_up": TILE, "down": TILE}, with tiles as epfuse's tables have them.

Exit status: 0 good, 1 a trial is wrong or does not run, 2 usage, or compiling took the whole budget.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--shape",
    "shapes",
    callback=comma_names((*LAYERS, CUSTOM)),
    default="minimax-m3-ep8",
    show_default=True,
    metavar="NAME,..",
    help=f"Layers: some of {', '.join(LAYERS)}; or {CUSTOM}. What they try alike is compiled once.",
)
@click.option("--hidden", type=int, metavar="H", help="Model dimension.")
@click.option("--intermediate", type=int, metavar="I", help="Width of an expert on this rank.")
@click.option("--experts", type=int, metavar="E", help="Experts over all ranks.")
@click.option("--top-k", type=int, metavar="K", help="Routes per token.")
@click.option("--ep-size", type=int, metavar="P", help="Ranks that share the experts.")
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), help="[default: the shape's]")
@click.option(
    "--path", "paths", callback=comma_names(PATHS), default="w8a16,bf16", show_default=True, metavar="NAME,.."
)
@click.option("--tokens", callback=token_counts, default=DEFAULT_TOKENS, show_default=True, metavar="T,..")
@click.option(
    "--space",
    type=click.Choice([space.value for space in Space]),
    default=Space.FULL.value,
    show_default=True,
    help="full: all tiles that the kernels take; known: those of the defaults and of any layer's tables.",
)
@click.option(
    "--budget", type=click.IntRange(min=1), default=600, show_default=True, help="Seconds, compiling included."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of tables.  [default: epfuse's]")
@click.option("--part", callback=_part, default="1/1", show_default=True, metavar="I/N", help="Of N ranks' work.")
@click.option("--again", is_flag=True, help="Also points that the tables have from this device and these versions.")
@click.option("--workers", type=click.IntRange(min=1), help="Compiling processes.  [default: the CPUs]")
@click.option("--from-vllm", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Tiles to try as well.")
@click.option("--to-vllm", type=click.Path(file_okay=False, path_type=Path), help="Folder for a tile file of vLLM's.")
@click.option("--trials", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Time these tiles only.")
@click.option("--keep", is_flag=True, help="With --trials: write the fastest of each path and T to the tables.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N (CUDA and ROCm).")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON instead of a table.")
def tune(
    shapes: tuple[str, ...],
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    top_k: int | None,
    ep_size: int | None,
    activation: str | None,
    paths: tuple[str, ...],
    tokens: tuple[int, ...],
    space: str,
    budget: int,
    out: Path | None,
    part: tuple[int, int],
    again: bool,
    workers: int | None,
    from_vllm: Path | None,
    to_vllm: Path | None,
    trials: Path | None,
    keep: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Search the tiles of both GEMMs of a layer, token count by token count, on the GPU of this machine.

    Tiles are compiled first, and those that spill or take too much LDS or shared memory are dropped. The rest is timed
    stage by stage in CUDA or HIP graphs, and the best as whole calls. What a tile computes is compared in every timing,
    so a wrong one can't win. Each token count is written to the tables when it is done; a run that was stopped goes on
    where it ended. Several ranks may share a folder: give each its --part.

    With --trials nothing is searched: the tiles of the file are judged and timed, and with --keep the fastest right
    ones are written to the tables.
    """
    sizes = {
        "hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k, "ep_size": ep_size,
    }  # fmt: skip
    layers = [make_layer(shape, sizes, activation) for shape in shapes]
    for option, value in (("--trials", trials), ("--from-vllm", from_vllm), ("--to-vllm", to_vllm)):
        if value is not None and len(layers) > 1:
            raise click.UsageError(f"{option} is for one shape; --shape names {len(layers)}")
    if keep and trials is None:
        raise click.UsageError("--keep goes with --trials; a search writes its tables anyway")
    if out is not None and trials is not None and not keep:
        raise click.UsageError("--out says where tables are written; with --trials that takes --keep")
    gpu = _gpu(device)
    folder = store.TABLES if out is None else out
    found = Device(target_of(gpu), device_name(gpu), torch.__version__, triton.__version__)
    cpus = workers or len(os.sched_getaffinity(0))
    if trials is not None:
        _refuse_search_options()
        request = Request(found, layers[0].shape, (), (), folder, _command())
        _try(read_trials(trials), request, layers[0], gpu, seed, cpus, as_json, keep)
        return
    layer_paths = tuple(LayerPath(name) for name in paths)
    jobs = []
    for layer in layers:
        extra = () if from_vllm is None else tuple(vllm_files.read(from_vllm, layer.shape).items())
        request = Request(found, layer.shape, layer_paths, tokens, folder, _command(), extra, Space(space))
        points = request.points()[part[0] - 1 :: part[1]] if again else pending(request, part)
        jobs.append(Job(layer, request, [plan_of(request, point) for point in points]))
    _search(jobs, gpu, seed, budget, cpus)
    if as_json:
        values = [{"shape": job.layer.name} | console.to_json(outcome) for job in jobs for outcome in job.outcomes]
        click.echo(json.dumps(values, indent=2, allow_nan=False))
    else:
        screen = _screen()
        for job in jobs:
            console.show(job.request, job.outcomes, len(job.plans), screen)
    if to_vllm is not None:
        _write_vllm(to_vllm, jobs[0].request, jobs[0].outcomes)


@dataclass
class Job:
    """One layer's part of a run."""

    layer: Layer
    request: Request
    plans: list[Plan]
    outcomes: list[Outcome] = field(default_factory=list)


def _search(jobs: list[Job], gpu: torch.device, seed: int, budget: int, workers: int) -> None:
    """Compile what all layers try, then search them one after another; the time goes by how much each has to try."""
    from epfuse.tuning.bench import DeviceBench
    from epfuse.tuning.prune import candidates_of, distinct, unfit

    begun = time.monotonic()
    with console.progress() as progress:
        watch = console.ProgressWatch(progress)
        tries = [[candidates_of(job.request, plan) for plan in job.plans] for job in jobs]
        compiling = distinct(candidate for plans in tries for plan in plans for candidate in plan)
        found = unfit(compiling, workers, watch.compiled) if compiling else {}
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
            job.outcomes = run(job.request, plans, DeviceBench(job.layer, gpu, seed=seed), watch, share, time.monotonic)
            to_do -= steps
            torch.cuda.empty_cache()  # the next layer's weights may need it


def _try(
    trials: tuple[Trial, ...],
    request: Request,
    layer: Layer,
    gpu: torch.device,
    seed: int,
    workers: int,
    as_json: bool,
    keep: bool,
) -> None:
    from epfuse.tuning.bench import DeviceBench
    from epfuse.tuning.prune import candidates_of, distinct, unfit

    device = request.device
    with console.progress() as progress:
        watch = console.ProgressWatch(progress)
        plans = plans_of(trials, device.target)
        compiling = distinct(candidate for plan in plans for candidate in candidates_of(request, plan))
        unfit(compiling, workers, watch.compiled)  # for the cache: a tile that spills is timed all the same
        task = progress.add_task("timing", total=len(trials))
        bench = DeviceBench(layer, gpu, seed=seed)
        results = run_trials(trials, device.target, bench, lambda result: progress.advance(task))
    if keep:
        kept = keep_fastest(request, results)
        click.echo(f"{kept} of {len(results)} trials written to {request.folder / device.target.value}", err=True)
    if as_json:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": request.source,
            "device": machine.describe_device(gpu),
            "clocks": machine.read_clocks(gpu),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "shape": asdict(layer.shape),
            "trials": [result.to_json() for result in results],
        }
        click.echo(json.dumps(record, indent=1, allow_nan=False))
    else:
        console.show_results(results, device, _screen())
    if any(result.fault is not None for result in results):
        sys.exit(1)


def _screen() -> Console:
    """Standard output, with room for a table where no terminal says how many columns there are."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _refuse_search_options() -> None:
    """Trials say what is timed; an option of the search beside them would be left out of account."""
    context = click.get_current_context()
    for name in SEARCH_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = next(parameter for parameter in context.command.params if parameter.name == name)
            raise click.UsageError(f"{option.opts[0]} is for a search; with --trials the file says what is timed")


def _gpu(name: str) -> torch.device:
    try:
        gpu = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; it must be cuda or cuda:N") from None
    if gpu.type != "cuda" or not torch.cuda.is_available() or (gpu.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device is {name!r}; tiles are searched on a GPU, and torch finds {torch.cuda.device_count()}"
        )
    gpu = torch.device("cuda", gpu.index or 0)
    torch.cuda.set_device(gpu)
    return gpu


def _write_vllm(folder: Path, request: Request, outcomes: list[Outcome]) -> None:
    tiles = {outcome.point.tokens: outcome.tiles for outcome in outcomes if outcome.point.path is LayerPath.BF16}
    if not tiles:
        raise ConfigError("--to-vllm writes the BF16 path's tiles, and none was tuned in this run")
    name = vllm_files.file_name(request.shape, request.device.name)
    click.echo(f"wrote {vllm_files.write(folder, name, tiles, request.device.triton)}", err=True)


def _command() -> str:
    return shlex.join(["epfuse", *sys.argv[1:]])
