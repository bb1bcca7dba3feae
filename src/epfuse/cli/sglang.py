"""``epfuse sglang``: what the plugin would do."""

from __future__ import annotations

import json

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.config import Policy
from epfuse.report.terminal import Console

GPUS = ("sm_90", "gfx942", "gfx950")


@click.group()
def sglang() -> None:
    """Serve with SGLang and epfuse's experts."""


EPILOG = """\b
Examples:
  epfuse sglang explain --tp 4 --ep 4 --device "NVIDIA H200"
  epfuse sglang explain --model ./MiniMax-M3 --tp 8 --ep 8 --target gfx942
  epfuse sglang explain --model qwen3-30b-a3b --tp 2 --ep 1 --moe-runner-backend epfuse --json
"""


@sglang.command(epilog=EPILOG)
@click.option(
    "--model",
    default="minimax-m3",
    show_default=True,
    metavar="MODEL",
    help="A config.json, the directory that has it, or a name that `epfuse plan --config` knows.",
)
@click.option("--tp", type=click.IntRange(min=1), default=4, show_default=True, help="--tp-size: all ranks.")
@click.option("--ep", type=click.IntRange(min=1), default=4, show_default=True, help="--ep-size; it divides --tp.")
@click.option("--target", type=click.Choice(GPUS), default=GPUS[0], show_default=True, help="The GPUs.")
@click.option("--device", metavar="NAME", help="The product, as torch names it.  [default: H100, MI300X]")
@click.option("--moe-runner-backend", default="auto", show_default=True, help="As SGLang has it; or epfuse.")
@click.option("--moe-a2a-backend", default="none", show_default=True, help="How ranks exchange tokens.")
@click.option("--fp8-gemm-backend", default="auto", show_default=True, help="Kernels of linear layers.")
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), help="[default: EPFUSE_POLICY, else auto]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def explain(
    model: str,
    tp: int,
    ep: int,
    target: str,
    device: str | None,
    moe_runner_backend: str,
    moe_a2a_backend: str,
    fp8_gemm_backend: str,
    policy: str | None,
    as_json: bool,
) -> None:
    """Show what runs a model's experts without epfuse and with it, and why. Needs neither a GPU nor SGLang.

    Exit code 1: with epfuse the server would not start, for the reason that is printed.
    """
    from epfuse.cli.explained import layer_table
    from epfuse.integrations.sglang.explain import SGLangDeployment
    from epfuse.integrations.sglang.explain import explain as explain_layers
    from epfuse.target import REFERENCE_DEVICE, Target
    from epfuse.weights.named_models import find_model, find_quant_method

    experts, gpu = find_model(model), Target(target)
    deployment = SGLangDeployment(gpu, tp, ep, moe_runner_backend, fp8_gemm_backend, moe_a2a_backend, device)
    found = explain_layers(experts, find_quant_method(model), deployment, None if policy is None else Policy(policy))
    delivery = Delivery()
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps({"model": experts.name, **found.to_json()}, indent=2))
        else:
            console = Console()
            console.print(
                layer_table(
                    found.groups,
                    f"{experts.name}, SGLang, {device or REFERENCE_DEVICE[gpu]} ({target}), tp {tp}, ep {ep}",
                )
            )
            lines = (
                f"Experts that epfuse runs: {found.expert_bytes / 1e9:.1f} GB a rank.",
                found.linears and f"Other linear layers: {found.linears}",
                found.stops and f"The server does not start: {found.stops}",
            )
            console.print("\n".join(filter(None, lines)), highlight=False)
    delivery.exit(passed=found.stops is None)
