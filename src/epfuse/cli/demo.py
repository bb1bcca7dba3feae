"""``epfuse demo``."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import NoReturn

import click

EPILOG = """\b
Examples:
  epfuse demo
  epfuse demo --ranks 4 --text notes.txt --html report.html
  epfuse demo --weights mxfp8
  epfuse demo --json | jq .checks

Exit status: 0 all checks passed, 1 a check or a rank failed, 2 wrong usage, or the demo can't run or report here,
130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.option("--ranks", default=8, show_default=True, metavar="P", help="Expert-parallel ranks; must divide 128.")
@click.option("--tokens", default=256, show_default=True, metavar="T", help="Prompt tokens to read, 2048 at most.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto: float32 on a CPU, bfloat16 on a GPU.",
)
@click.option(
    "--weights",
    type=click.Choice(["dense", "mxfp8"]),
    default="dense",
    show_default=True,
    help="Of the experts; mxfp8: the ranks hold MXFP8, the untouched model the same numbers.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the model's weights.")
@click.option("--json", is_flag=True, help="Print the record as JSON instead of tables.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    default=Path("epfuse-demo.html"),
    show_default=True,
    help="Where to write the report.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="File to read  [default: the repository's README]",
)
def demo(
    ranks: int, tokens: int, dtype: str, weights: str, seed: int, json: bool, html: Path, text: Path | None
) -> None:
    """Run MiniMax-M3 with its experts on expert-parallel ranks, and compare with the untouched model.

    A small text model of transformers' own MiniMax-M3 code reads real text. Its routed experts run on P processes,
    which hold 128/P experts each; logits, greedy tokens and every MoE layer are compared with the model as transformers
    runs it.
    """
    from epfuse.errors import EpfuseError

    try:
        _run(ranks, tokens, dtype, weights, seed, json, html, text)
    except EpfuseError as error:
        raise click.UsageError(str(error)) from error


def _run(
    ranks: int, tokens: int, dtype: str, weights: str, seed: int, json: bool, html: Path, text: Path | None
) -> NoReturn:
    from epfuse.cli.delivery import Delivery
    from epfuse.cli.main import EXIT_CHECK_FAILED
    from epfuse.config import WeightFormat

    delivery = Delivery({"--html": html})
    _need_transformers()
    from epfuse.demo.console import print_record
    from epfuse.demo.page import demo_page
    from epfuse.demo.run import run_demo
    from epfuse.demo.settings import DemoSettings
    from epfuse.demo.text import read_text
    from epfuse.parallel.launch import RankFailed
    from epfuse.report.terminal import Console
    from epfuse.report.write import write_atomic

    settings = DemoSettings(ranks=ranks, tokens=tokens, dtype=_resolve(dtype), weights=WeightFormat(weights), seed=seed)
    try:
        record = run_demo(settings, read_text(text))
    except RankFailed as error:
        click.echo(f"epfuse: {error}", err=True)
        sys.exit(EXIT_CHECK_FAILED)
    except OSError as error:  # no temporary folder, a full disk, no process
        raise click.UsageError(f"the demo can't run here: {error}") from error
    with delivery.of("standard output"):
        if json:
            click.echo(jsonlib.dumps(record.as_json(), indent=2, allow_nan=False))
        else:
            print_record(record, Console())
    with delivery.of("--html"):
        write_atomic(html, demo_page(record))
        click.echo(f"report: {html}", err=True)
    delivery.exit(passed=record.passed)


def _resolve(dtype: str) -> str:
    """``auto``: bfloat16 on a GPU, as the kernels are; elsewhere float32, in which all tokens must agree."""
    from epfuse.parallel.launch import Placement

    if dtype != "auto":
        return dtype
    return "float32" if Placement.choose(1) is Placement.CPU else "bfloat16"


def _need_transformers() -> None:
    """Check the demo's extra once, here, so that the modules behind it can import what they use."""
    from importlib.util import find_spec

    from epfuse.errors import MissingDependency

    missing = [name for name in ("transformers", "jinja2") if find_spec(name) is None]
    if missing:
        raise MissingDependency(f"the demo needs {' and '.join(missing)}: pip install 'epfuse[demo]'")
    try:
        from transformers import MiniMaxM3VLForCausalLM  # noqa: F401
    except ImportError as error:
        raise MissingDependency("this transformers has no MiniMax-M3 (5.23 has): pip install 'epfuse[demo]'") from error
