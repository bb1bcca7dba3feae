"""``epfuse profile``."""

from __future__ import annotations

import importlib
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.errors import TraceError
from epfuse.report.write import write_atomic

if TYPE_CHECKING:
    from epfuse.profiling.record import Profile
    from epfuse.profiling.shapes import ExpertShape

SHAPE_NAMES = ["minimax-m3-ep8", "minimax-m3-tp8", "gpt-oss-20b", "gpt-oss-120b"]
WEIGHT_FORMATS = ["bf16", "mxfp8", "block_fp8", "mxfp4"]

EPILOG = """\b
Examples:
  epfuse profile rank0.pt.trace.json.gz
  epfuse profile rank0.pt.trace.json.gz --shape minimax-m3-ep8 --weights mxfp8 --html profile.html
  epfuse profile --compare before.json.gz after.json.gz
  epfuse profile rank0.pt.trace.json.gz --json | jq '.phases[] | [.name, .us]'

\b
Exit status: 0 good, 1 not one kernel was recognised, 2 usage, a trace that can't be used, or a result that could not
be written; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print the record as JSON instead of tables; times in microseconds.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained page.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write one layer's timeline as a picture.")
@click.option(
    "--window",
    default="auto",
    show_default=True,
    metavar="auto|N|FIRST..LAST",
    help="Steps to profile, from 0; auto: the decode step of median duration.",
)
@click.option("--map", "rules", type=click.Path(path_type=Path), help="YAML rules to try before the shipped ones.")
@click.option("--compare", is_flag=True, help="Two traces side by side, phase by phase.")
@click.option("--shape", type=click.Choice(SHAPE_NAMES), help="The expert layer: bytes, bandwidth, predictions.")
@click.option("--config", type=click.Path(path_type=Path), help="The same from a model's config.json.")
@click.option("--ep-size", default=1, show_default=True, metavar="P", help="With --config: expert-parallel ranks.")
@click.option("--tp-size", default=1, show_default=True, metavar="P", help="With --config: ranks that slice an expert.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHT_FORMATS),
    help="Expert weights in memory  [default: what kernel names or the shape say]",
)
@click.option(
    "--tokens", type=click.IntRange(1, 2**31 - 1), metavar="T", help="Tokens of a step, if no annotation says."
)
def profile(
    traces: tuple[Path, ...],
    json: bool,
    html: Path | None,
    svg: Path | None,
    window: str,
    rules: Path | None,
    compare: bool,
    shape: str | None,
    config: Path | None,
    ep_size: int,
    tp_size: int,
    weights: str | None,
    tokens: int | None,
) -> None:
    """Where a step's time goes: phases, layers, gaps and expert bandwidth of a PyTorch profiler trace.

    Reads Chrome traces (.json, .json.gz) of vLLM, SGLang and plain PyTorch from CUDA and ROCm, finds the steps, sorts
    every kernel into a phase, and lists what it can't sort.
    """
    if compare and len(traces) != 2:
        raise click.UsageError(f"--compare takes two traces, not {len(traces)}")
    delivery = Delivery({"--html": html, "--svg": svg})
    if html is not None or svg is not None:
        importlib.import_module("epfuse.profiling.page")  # what it needs is missed now, and not after the work
    experts = _experts(shape, config, ep_size, tp_size)
    found = _profiles(traces, window, rules, experts, weights, tokens)
    profiles = [one for group in found for one in group]
    if compare:
        for path, group in zip(traces, found, strict=True):
            if len(group) > 1:
                raise TraceError(f"{path} has kernels of {len(group)} devices; --compare takes one a trace")
    with delivery.of(STDOUT):
        _print(profiles, json, compare)
    _write(profiles, html, svg, compare, delivery)
    unknown = [one.path for one in profiles if not one.phases]
    for name in unknown:
        click.echo(f"epfuse: no kernel of {name} was recognised; --map takes rules for it", err=True)
    delivery.exit(passed=not unknown)


def _write(profiles: list[Profile], html: Path | None, svg: Path | None, compare: bool, delivery: Delivery) -> None:
    """The page of all profiles and the picture of the first one, as far as they are wanted."""
    if html is not None:
        from epfuse.profiling.page import profile_page

        with delivery.of("--html"):
            write_atomic(html, profile_page(profiles, compare))
            click.echo(f"written: {html}", err=True)
    if svg is not None:
        from epfuse.profiling.page import timeline_svg

        with delivery.of("--svg"):
            if not profiles[0].timeline:
                raise TraceError(f"{profiles[0].path} has no layers that repeat; there is no timeline to draw")
            write_atomic(svg, timeline_svg(profiles[0]))
            click.echo(f"written: {svg}", err=True)


def _experts(shape: str | None, config: Path | None, ep_size: int, tp_size: int) -> ExpertShape | None:
    from epfuse.profiling.shapes import SHAPES, read_config

    if config is None:
        if (ep_size, tp_size) != (1, 1):
            raise click.UsageError("--ep-size and --tp-size belong to --config")
        return SHAPES[shape] if shape else None
    if shape is not None:
        raise click.UsageError("--shape and --config exclude each other")
    return read_config(config, ep_size, tp_size)


def _profiles(
    paths: tuple[Path, ...],
    window: str,
    rules: Path | None,
    experts: ExpertShape | None,
    weights: str | None,
    tokens: int | None,
) -> list[list[Profile]]:
    """The profiles of each trace's devices. What can be refused at once is refused before the first trace is read."""
    from epfuse.profiling.classify import Classifier
    from epfuse.profiling.json_stream import check_trace
    from epfuse.profiling.profile import profile_trace
    from epfuse.profiling.read_trace import read_trace
    from epfuse.profiling.rules import RuleSet
    from epfuse.profiling.steps import check_window
    from epfuse.profiling.text import printable
    from epfuse.report.late_bar import LateBar

    check_window(window)
    classifier = Classifier(RuleSet.load(rules))
    for path in paths:
        check_trace(path)
    found = []
    for path in paths:
        with LateBar(f"reading {printable(path.name)}", in_bytes=True) as bar:
            trace = read_trace(path, bar.update)
        found.append(profile_trace(trace, classifier, window=window, shape=experts, weights=weights, tokens=tokens))
    return found


def _print(profiles: list[Profile], json: bool, compare: bool) -> None:
    """One record is the document itself, several are a list in it."""
    from epfuse.profiling.compare import compare_json
    from epfuse.profiling.console import print_comparison, print_profile
    from epfuse.report.terminal import Console

    if json:
        if compare:
            record = compare_json(profiles[0], profiles[1])
        elif len(profiles) == 1:
            record = profiles[0].to_json()
        else:
            record = {"profiles": [one.to_json() for one in profiles]}
        click.echo(jsonlib.dumps(record, indent=2, allow_nan=False))
        return
    console = Console()
    if compare:
        print_comparison(profiles[0], profiles[1], console)
        return
    for index, one in enumerate(profiles):
        if index:
            console.print()
        print_profile(one, console)
