"""``epfuse tune``: search tiles on the present GPU."""

from __future__ import annotations

import os
import pathlib
import re

import click
from click.core import ParameterSource

from epfuse.bench.layers import ACTIVATIONS, CUSTOM, LAYERS, make_layer
from epfuse.cli.names import comma_names, layer_sizes, token_counts
from epfuse.config import Path
from epfuse.errors import MissingDependency

DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
SEARCH_OPTIONS = ("paths", "tokens", "space", "budget", "part", "again", "from_vllm", "to_vllm")
"""Parameters of `tune` that say what is searched."""
PATHS = ("w8a16", "bf16", "w8a8", "block_fp8")
SPACES = ("full", "known")
"""Names of what is behind them, here so that the help needs neither torch nor Triton."""


def _part(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", value)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{value!r} is no part such as 1/4")
    return int(found[1]), int(found[2])


EPILOG = """\b
Examples:
  epfuse tune --shape minimax-m3-ep8 --tokens 64,1024 --budget 300
  epfuse tune --shape gpt-oss-20b-biases --path bf16 --tokens 1,16,64
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
@layer_sizes("Ranks that share the experts.")
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), help="[default: the shape's]")
@click.option(
    "--path", "paths", callback=comma_names(PATHS), default="w8a16,bf16", show_default=True, metavar="NAME,.."
)
@click.option("--tokens", callback=token_counts, default=DEFAULT_TOKENS, show_default=True, metavar="T,..")
@click.option(
    "--space",
    type=click.Choice(SPACES),
    default=SPACES[0],
    show_default=True,
    help="full: all tiles that the kernels take; known: those of the defaults and of any layer's tables.",
)
@click.option(
    "--budget", type=click.IntRange(min=1), default=600, show_default=True, help="Seconds, compiling included."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder of tables.  [default: epfuse's]"
)
@click.option("--part", callback=_part, default="1/1", show_default=True, metavar="I/N", help="Of N ranks' work.")
@click.option("--again", is_flag=True, help="Also points that the tables have from this device and these versions.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Compiling processes.  [default: the CPUs]")
@click.option(
    "--from-vllm", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path), help="Tiles to try as well."
)
@click.option(
    "--to-vllm", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder for a tile file of vLLM's."
)
@click.option(
    "--trials", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path), help="Time these tiles only."
)
@click.option("--keep", is_flag=True, help="With --trials: write the fastest of each path and T to the tables.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N (CUDA and ROCm).")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON instead of a table.")
def tune(
    shapes: tuple[str, ...],
    sizes: dict[str, int | None],
    activation: str | None,
    paths: tuple[str, ...],
    tokens: tuple[int, ...],
    space: str,
    budget: int,
    out: pathlib.Path | None,
    part: tuple[int, int],
    again: bool,
    workers: int | None,
    from_vllm: pathlib.Path | None,
    to_vllm: pathlib.Path | None,
    trials: pathlib.Path | None,
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
    layers = [make_layer(shape, sizes, activation) for shape in shapes]
    for option, value in (("--trials", trials), ("--from-vllm", from_vllm), ("--to-vllm", to_vllm)):
        if value is not None and len(layers) > 1:
            raise click.UsageError(f"{option} is for one shape; --shape names {len(layers)}")
    if keep and trials is None:
        raise click.UsageError("--keep goes with --trials; a search writes its tables anyway")
    if out is not None and trials is not None and not keep:
        raise click.UsageError("--out says where tables are written; with --trials that takes --keep")
    try:
        from epfuse.cli.tune_run import Options, search_layers, try_tiles
    except ModuleNotFoundError as error:
        raise MissingDependency(f"'epfuse tune' needs the package {error.name!r}, which is not installed") from error
    from epfuse.tuning.space import Space
    from epfuse.tuning.trials import read_trials

    options = Options(device, out, seed, workers or len(os.sched_getaffinity(0)), as_json)
    if trials is not None:
        _refuse_search_options()
        try_tiles(options, layers[0], read_trials(trials), keep)
    layer_paths = tuple(Path(name) for name in paths)
    search_layers(options, layers, layer_paths, tokens, Space(space), part, again, budget, from_vllm, to_vllm)


def _refuse_search_options() -> None:
    """Trials say what is timed; an option of the search beside them would be left out of account."""
    context = click.get_current_context()
    for name in SEARCH_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = next(parameter for parameter in context.command.params if parameter.name == name)
            raise click.UsageError(f"{option.opts[0]} is for a search; with --trials the file says what is timed")
