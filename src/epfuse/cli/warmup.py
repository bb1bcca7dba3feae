"""``epfuse warmup``: compile a model's kernels ahead of time, for images without a compiler."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import click

from epfuse.cli.delivery import Delivery
from epfuse.errors import MissingDependency
from epfuse.report.terminal import bars

TARGETS = ("sm_90", "gfx942", "gfx950")


EPILOG = """\b
Example:
  epfuse warmup --target sm_90 --device "NVIDIA H200" --tp 8 --max-tokens 8192 --out kernels
"""


@click.command(epilog=EPILOG)
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    metavar="CONFIG",
    help="A config.json, or the directory that has it.  [default: MiniMax-M3]",
)
@click.option("--target", type=click.Choice(TARGETS), required=True, help="The GPUs, none of which need be there.")
@click.option("--device", metavar="NAME", help="The product, as torch names it.  [default: H100, MI300X, MI355X]")
@click.option("--tp", type=click.IntRange(min=1), default=8, show_default=True, help="--tensor-parallel-size.")
@click.option("--ep/--no-ep", default=True, show_default=True, help="--enable-expert-parallel.")
@click.option("--max-tokens", type=click.IntRange(1, 2**20), default=8192, show_default=True, help="Of a call.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Compiling processes.  [default: the CPUs]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to fill.")
@click.option("--times", is_flag=True, help="Print each kernel's compile time, seconds of CPU, the slowest first.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's summary and all times as JSON.")
def warmup(
    model: Path | None,
    target: str,
    device: str | None,
    tp: int,
    ep: bool,
    max_tokens: int,
    workers: int | None,
    out: Path,
    times: bool,
    as_json: bool,
) -> None:
    """Compile every kernel that a model's layers can launch, into a folder that goes into a container image.

    Neither a GPU nor its driver is needed; for sm_90 a C compiler is, for Triton's launchers. Where the folder is named
    by EPFUSE_KERNELS, epfuse compiles nothing that is in it. It must have been made with the same triton, epfuse and
    CPython; if not, the log says so and it is not used.
    """
    if find_spec("triton") is None:
        raise MissingDependency("'epfuse warmup' needs triton: pip install 'epfuse[cpu]'")
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled, whatever the environment says
    delivery = Delivery(folders={"--out": out})
    from epfuse.bundle import KERNELS, Bundle
    from epfuse.compiled.layer import kernels
    from epfuse.compiled.model import model_layers
    from epfuse.compiled.warm_up import compile_all
    from epfuse.target import REFERENCE_DEVICE, Target
    from epfuse.weights.model_config import MINIMAX_M3, read_model

    experts = MINIMAX_M3 if model is None else read_model(model / "config.json" if model.is_dir() else model)
    gpu, spread = Target(target), (tp, 1) if ep else (1, tp)
    found = model_layers(experts, gpu, device, *spread)
    wanted = list(dict.fromkeys(launch for layer in found.layers for launch in kernels(layer, max_tokens)))
    (out / KERNELS).mkdir(parents=True, exist_ok=True)
    with bars() as progress:
        task = progress.add_task(f"compiling for {target}", total=len(wanted))
        compiled = compile_all(
            wanted,
            workers or len(os.sched_getaffinity(0)),
            lambda done: progress.update(task, completed=done),
            (out / KERNELS).resolve(),
        )
    failures = [one.failure for one in compiled if one.failure is not None]
    described = [f"{layer.path.value}, {layer.shape}" for layer in found.layers]
    made = Bundle.write(out, target, device or REFERENCE_DEVICE[gpu], described, max_tokens)
    summary = {
        **made.manifest.model_dump(exclude={"files"}),
        "kernels": len(wanted) - len(failures),
        "failures": failures,
        "compiled": [
            {
                "kernel": one.launch.kernel,
                "constants": {name: value for name, value in one.launch.constants if isinstance(value, int)},
                "cpu_seconds": round(one.cpu_seconds, 2),
            }
            for one in compiled
            if one.cpu_seconds is not None
        ],
        "left": {str(index): reason for index, reason in found.left.items()},
    }
    with delivery.of("standard output"):
        if as_json:
            click.echo(json.dumps(summary, indent=2))
        else:
            click.echo(f"{summary['kernels']} kernels of {experts.name} for {made.manifest.product} in {out}")
            for one in summary["compiled"] if times else ():
                constants = " ".join(f"{name}={value}" for name, value in one["constants"].items())
                click.echo(f"{one['cpu_seconds']:7.2f} s  {one['kernel']}  {constants}")
    for reason in dict.fromkeys(found.left.values()):
        click.echo(f"left as they are: layers of which {reason}", err=True)
    for failure in failures:
        click.echo(f"FAIL {failure}", err=True)
    delivery.exit(passed=not failures)
