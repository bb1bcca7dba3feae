"""``epfuse vllm``: what the plugin would do, and the patch for images where no plugin can be installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import click

from epfuse.cli.delivery import Delivery
from epfuse.config import Policy
from epfuse.integrations.vllm.patch import run
from epfuse.integrations.vllm.patch.site import find_site
from epfuse.report.terminal import Console

GPUS = ("gfx942", "gfx950", "sm_90")


@click.group()
def vllm() -> None:
    """Serve with vLLM and epfuse's experts."""


EPILOG = """\b
Examples:
  epfuse vllm explain --model ./MiniMax-M3 --tp 8 --target sm_90 --device "NVIDIA H200"
  epfuse vllm explain --tp 1 --dp 8 --target sm_90
  epfuse vllm explain --no-ep --vllm-version 0.25.1 --json
"""


@vllm.command(epilog=EPILOG)
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    metavar="CONFIG",
    help="A config.json, or the directory that has it.  [default: MiniMax-M3]",
)
@click.option("--tp", type=click.IntRange(min=1), default=8, show_default=True, help="--tensor-parallel-size.")
@click.option("--dp", type=click.IntRange(min=1), default=1, show_default=True, help="--data-parallel-size.")
@click.option("--ep/--no-ep", default=True, show_default=True, help="--enable-expert-parallel.")
@click.option(
    "--target",
    type=click.Choice(GPUS),
    default=GPUS[0],
    show_default=True,
    help="The GPUs.",
)
@click.option("--device", metavar="NAME", help="The product, as torch names it.  [default: MI300X, H100]")
@click.option("--vllm-version", default="0.33.0", show_default=True, help="The release that serves.")
@click.option("--max-model-len", type=click.IntRange(1, 2**31 - 1), default=9472, show_default=True)
@click.option("--moe-backend", default="auto", show_default=True, help="--moe-backend of vllm serve.")
@click.option(
    "--all2all-backend",
    default="allgather_reducescatter",
    show_default=True,
    help="--all2all-backend: how --dp ranks with --ep exchange tokens.",
)
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), help="[default: EPFUSE_POLICY, else auto]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def explain(
    model: Path | None,
    tp: int,
    dp: int,
    ep: bool,
    target: str,
    device: str | None,
    vllm_version: str,
    max_model_len: int,
    moe_backend: str,
    all2all_backend: str,
    policy: str | None,
    as_json: bool,
) -> None:
    """Show what runs a model's experts without epfuse and with it, and why. Needs neither a GPU nor vLLM."""
    from epfuse.cli.explained import layer_table
    from epfuse.integrations.vllm.explain import Deployment
    from epfuse.integrations.vllm.explain import explain as explain_layers
    from epfuse.target import REFERENCE_DEVICE, Target
    from epfuse.weights.model_config import MINIMAX_M3, read_model

    experts = MINIMAX_M3 if model is None else read_model(model / "config.json" if model.is_dir() else model)
    gpu = Target(target)
    backend = moe_backend.lower().replace("-", "_")  # as vLLM reads it
    deployment = Deployment(gpu, vllm_version, tp, ep, max_model_len, backend, device, dp, all2all_backend)
    groups = explain_layers(experts, deployment, None if policy is None else Policy(policy))
    delivery = Delivery()
    with delivery.of("standard output"):
        if as_json:
            click.echo(json.dumps({"model": experts.name, "groups": [group.to_json() for group in groups]}, indent=2))
        else:
            product = device or REFERENCE_DEVICE[gpu]
            ranks = f"tp {tp}{f', dp {dp}' if dp > 1 else ''}{', ep' if ep else ''}"
            title = f"{experts.name}, vLLM {vllm_version}, {product} ({target}), {ranks}"
            Console().print(layer_table(groups, title))
    delivery.exit(passed=True)


@vllm.group()
def patch() -> None:
    """Patch an installed vLLM, where the plugin can't be installed but epfuse can be imported."""


_site_option = click.option(
    "--site",
    "root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The site-packages that has vLLM.  [default: that of this interpreter]",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@patch.command(epilog="Example: epfuse vllm patch status --site venv/lib/python3.12/site-packages")
@_site_option
@_json_option
def status(root: Path | None, as_json: bool) -> None:
    """Say what vLLM's files are; change nothing."""
    _show(run.status(find_site(root)), as_json)


@patch.command(epilog="Example: epfuse vllm patch apply --site venv/lib/python3.12/site-packages")
@_site_option
@_json_option
def apply(root: Path | None, as_json: bool) -> None:
    """Patch vLLM; does nothing where that is done. Anything unknown is refused."""
    _show(run.apply(find_site(root)), as_json)


@patch.command(epilog="Example: epfuse vllm patch verify --site venv/lib/python3.12/site-packages")
@_site_option
@_json_option
def verify(root: Path | None, as_json: bool) -> None:
    """Exit with 1 unless vLLM is patched by this version and otherwise as its wheel installed it."""
    report = run.status(find_site(root))
    _show(report, as_json, passed=report.state is run.PatchState.APPLIED)


@patch.command(epilog="Example: epfuse vllm patch revert --site venv/lib/python3.12/site-packages")
@_site_option
@_json_option
def revert(root: Path | None, as_json: bool) -> None:
    """Bring back the wheel's own bytes."""
    _show(run.revert(find_site(root)), as_json)


def _show(report: run.Report, as_json: bool, passed: bool = True) -> NoReturn:
    """Print it, and exit with 0, 1 if ``passed`` is not true, or 2 if it can't be printed."""
    delivery = Delivery()
    with delivery.of("standard output"):
        if as_json:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            did = " (changed)" if report.changed else ""
            click.echo(f"vLLM {report.site.release} in {report.site.root}: {report.state.value}{did}")
            if report.detail:
                click.echo(report.detail)
    delivery.exit(passed=passed)
