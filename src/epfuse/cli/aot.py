"""``epfuse aot``: compile every kernel for GPUs that are not there, and judge what came out."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import click

from epfuse.cli.aot_execute import PARTS
from epfuse.cli.aot_execute import execute as run_execute
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.names import comma_names
from epfuse.config import Path
from epfuse.errors import ConfigError, MissingDependency
from epfuse.report.terminal import bars, stdout

TARGETS = ("sm_90", "gfx942", "gfx950")
STAGES = ("route", "gather", "quantize", "gate_up", "activate", "down", "gate_up_down", "combine")
PATHS = ("w8a16", "bf16", "w8a8", "block_fp8")
SHAPES = ("minimax-m3", "gpt-oss-120b")
DTYPES = ("bf16", "fp16", "fp32")
"""Names of what is behind them, here so that the help needs no torch."""
Command = Callable[..., Any]


def names_option(option: str, variable: str, known: Iterable[str]) -> Callable[[Command], Command]:
    """``option`` takes some of ``known`` with commas between them; all of them by default."""
    names = tuple(known)
    some = comma_names(names)

    def split(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
        return some(context, parameter, value) or names

    text = f"Some of {', '.join(names)}.  [default: all]"
    return click.option(option, variable, callback=split, metavar="NAME,..", help=text)


EPILOG = """\b
Examples:
  epfuse aot --target gfx942 --stage gate_up,down --markdown
  epfuse aot --execute --seed 7
  epfuse aot --execute --cases all --faults all --keep results --json
"""


@click.command(epilog=EPILOG)
@names_option("--target", "targets", TARGETS)
@names_option("--stage", "stages", STAGES)
@names_option("--path", "paths", PATHS)
@names_option("--shape", "shapes", SHAPES)
@names_option("--dtype", "dtypes", DTYPES)
@click.option("--workers", type=click.IntRange(1, 1024), help="Compiling processes.  [default: the CPUs]")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder for the assembly of every kernel."
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON instead of tables.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--execute", is_flag=True, help="Execute gfx942's machine code under an ISA model instead.")
@click.option("--cases", type=click.Choice(PARTS), help="With --execute: which cases.  [default: share]")
@click.option("--faults", type=click.Choice(PARTS), help="With --execute: which faults.  [default: share]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="With --execute: draws the share.  [default: 0]")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="With --execute: folder of results; what a run that was ended has left there is not run again.",
)
def aot(
    targets: tuple[str, ...],
    stages: tuple[str, ...],
    paths: tuple[str, ...],
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    workers: int | None,
    out: pathlib.Path | None,
    as_json: bool,
    as_markdown: bool,
    execute: bool,
    cases: str | None,
    faults: str | None,
    seed: int | None,
    keep: pathlib.Path | None,
) -> None:
    """Compile every kernel that a call can launch, without the GPU, and check its resources.

    The launchers run on tensors without data, so what is compiled is what they launch: each kernel in each tile, with
    Triton's own specialisation of the arguments. From the code objects come registers, spills, scratch, LDS or shared
    memory, occupancy, and the instructions of the main loops; each gate that a kernel breaks names it. With gfx942
    there is also a time model of MI300X, whose results are predictions. Compiled kernels are kept in Triton's cache.

    --execute runs the compiled machine code of gfx942 on this CPU, under a model of its instruction set, and compares
    what it writes with the reference; and drops instructions, to see that the comparison notices. "share" is what a
    seed draws, minutes on two CPUs; "all" takes an hour or two of one CPU. Exit code 1 if anything differs.
    """
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown exclude each other")
    if find_spec("triton") is None:
        raise MissingDependency("'epfuse aot' needs triton: pip install 'epfuse[cpu]'")
    if execute:
        run_execute(cases or "share", faults or "share", seed or 0, workers, keep, as_json, as_markdown)
    if (cases, faults, seed, keep) != (None, None, None, None):
        raise ConfigError("--cases, --faults, --seed and --keep are for --execute")
    delivery = Delivery(folders={"--out": out})
    from epfuse.aot import mca, tables
    from epfuse.aot.run import CompileRequest, run
    from epfuse.target import Target

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    request = CompileRequest(
        targets=tuple(Target(name) for name in targets),
        stages=stages,
        paths=tuple(Path(name) for name in paths),
        shapes=shapes,
        dtypes=dtypes,
        workers=workers or len(os.sched_getaffinity(0)),
        folder=out,
        mca=mca.find(),
    )
    with bars() as progress:
        task = progress.add_task(f"compiling for {', '.join(targets)}", total=None)
        record = run(request, lambda done, total: progress.update(task, completed=done, total=total))
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(record.to_json(_command()), indent=2, allow_nan=False))
        elif as_markdown:
            click.echo(tables.markdown(tables.tables_of(record), _command()), nl=False)
        else:
            tables.show(tables.tables_of(record), stdout(240))
    for target in record.targets:
        for gate in target.gates:
            if not gate.ok:
                click.echo(f"FAIL {target.target.value}, {gate.name}: {gate.detail}", err=True)
    delivery.exit(passed=record.ok)


def _command() -> str:
    return shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
