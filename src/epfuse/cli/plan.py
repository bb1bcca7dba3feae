"""``epfuse plan``: what a policy would do with a model, before any GPU is there."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.config import Policy
from epfuse.environment import environment
from epfuse.errors import ConfigError
from epfuse.hardware.products import PRODUCTS, Product, product_of
from epfuse.integrations.vllm.explain import Deployment, explain, own_experts
from epfuse.planning import console
from epfuse.planning.layer_times import Rival
from epfuse.planning.model_plan import Serving, plan_model
from epfuse.planning.record import plan_record
from epfuse.report.terminal import stdout
from epfuse.report.write import write_atomic
from epfuse.target import Target
from epfuse.weights.model_config import ExpertModel
from epfuse.weights.named_models import find_model, named_models

LARGEST_HBM = 10**15
LONGEST = 2**31 - 1
"""Tokens; T*K of a call stays below 2**31."""
MOST_RANKS = 2**20
VLLM = "0.33.0"
"""The release whose choice stands beside a plan: the newest that is tested."""
UNITS = {"": 1, "GB": 10**9, "GiB": 1 << 30, "MiB": 1 << 20}


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A size such as ``192GiB``, ``141GB`` or plain bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)", value)
    size = None if found is None or found[2] not in UNITS else int(Decimal(found[1]) * UNITS[found[2]])
    if size is None or not 1 <= size <= LARGEST_HBM:
        shown = f"{value[:40]!r}..." if len(value) > 40 else repr(value)
        raise click.BadParameter(
            f"{shown} is no size; it must be like 192GiB, 141GB or a number of bytes, at most 1 PB"
        )
    return size


EPILOG = """\b
Examples:
  epfuse plan --config minimax-m3 --ep-size 8 --device mi300x --max-model-len 9472
  epfuse plan --config ./Qwen3-30B-A3B --ep-size 2 --device h200 --max-model-len 9472 --html plan.html
"""


@click.command(epilog=EPILOG)
@click.option(
    "--config",
    "source",
    required=True,
    metavar="CONFIG.json|DIR|NAME",
    help="A model's Hugging Face config.json, the folder that has it, or a name such as minimax-m3 or gpt-oss-120b.",
)
@click.option(
    "--ep-size", type=click.IntRange(1, MOST_RANKS), default=8, show_default=True, help="Ranks that share experts."
)
@click.option(
    "--target", type=click.Choice([target.value for target in Target if target.is_gpu]), help="[default: --device's]"
)
@click.option("--device", type=click.Choice(list(PRODUCTS)), help="A GPU of the target.  [default: its first]")
@click.option("--max-model-len", type=click.IntRange(1, LONGEST), required=True, help="The longest sequence, tokens.")
@click.option(
    "--hbm", callback=_bytes, metavar="BYTES", help="Memory of one GPU: 192GiB, 141GB.  [default: --device's]"
)
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), help="[default: EPFUSE_POLICY, else auto]"
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the planner's page of this plan.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of tables.")
def plan(
    source: str,
    ep_size: int,
    target: str | None,
    device: str | None,
    max_model_len: int,
    hbm: int | None,
    policy: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Plan a model's expert layers: storage, path and tile by token count, bytes a rank, predicted times.

    No GPU and no weights are needed. Times are predictions of a model that is calibrated on measurements of few cards;
    where a tuned table has no row near, a tile is the target's default. Both are said where they stand.
    """
    delivery = Delivery({"--html": html})
    product = _product(target, device)
    serving = Serving(product, ep_size, max_model_len, product.hbm_bytes if hbm is None else hbm)
    model = find_model(source)
    found = plan_model(model, serving, environment().policy if policy is None else Policy(policy))
    rival = rival_of(model, serving)
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(plan_record(found, rival), indent=2, allow_nan=False))
        else:
            console.show(found, rival, stdout(200))
    if html is not None:
        from epfuse.planning.page import page  # needs jinja2

        with delivery.of("--html"):
            named = named_models().get(source)
            name, said = (model.name, "the given config") if named is None else (source, named.source)
            write_atomic(html, page(name, said, found, rival))
    delivery.exit(passed=True)


def rival_of(model: ExpertModel, serving: Serving) -> Rival | None:
    """What vLLM would choose for the model's experts by itself; None where that is not known."""
    ranks, product = serving.ep_size, serving.product
    deployment = Deployment(
        product.target, VLLM, ranks, ranks > 1, serving.max_model_len, device_name=product.device_name
    )
    try:
        own = own_experts(model, deployment)
        groups = explain(model, deployment)
    except ConfigError:
        return None
    left = [group for group in groups if group.choice.plan is None]
    if not left:
        return Rival(own.name, own.effect, "epfuse's vLLM plugin takes these layers.")
    which = "these layers" if len(left) == len(groups) else "some of these layers"
    reasons = " ".join(dict.fromkeys(group.choice.reason for group in left))
    return Rival(own.name, own.effect, f"epfuse's vLLM plugin leaves {which} to vLLM: {reasons}")


def _product(target: str | None, device: str | None) -> Product:
    if device is not None:
        product = PRODUCTS[device]
        if target not in (None, product.target.value):
            raise ConfigError(f"device is {device!r}, which is {product.target.value}; target is {target!r}")
        return product
    if target is None:
        raise ConfigError("a plan needs --target or --device")
    return product_of(Target(target))
