"""``epfuse checkpoint make``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.names import SIZE
from epfuse.report.late_bar import LateBar
from epfuse.weights.checkpoint_format import Checkpoint

FAMILIES = (
    "minimax_m3_vl", "minimax_m3_vl_text", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "aria_text", "gemma4_text",
    "nemotron_h",
)  # fmt: skip
EPILOG = """\b
Examples:
  epfuse checkpoint make --family minimax_m3_vl --out small-m3
  epfuse checkpoint make --family deepseek_v3 --format bf16 --experts 16 --out small-v3
"""


@click.command(epilog=EPILOG)
@click.option("--family", type=click.Choice(FAMILIES), required=True, help="The model's type in config.json.")
@click.option(
    "--format",
    "form",
    type=click.Choice([form.value for form in Checkpoint]),
    help="The experts' numbers.  [default: the family's best known]",
)
@click.option("--hidden", type=SIZE, default=256, show_default=True, help="H.")
@click.option("--intermediate", type=SIZE, default=128, show_default=True, help="I.")
@click.option("--experts", type=SIZE, default=8, show_default=True, help="E.")
@click.option("--top-k", type=SIZE, default=2, show_default=True, help="K.")
@click.option("--layers", type=click.IntRange(1, 512), default=2, show_default=True, help="Layers with experts.")
@click.option("--dense-layers", type=click.IntRange(0, 512), default=0, show_default=True, help="Layers before them.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the weights.")
@click.option("--shard-mb", type=click.IntRange(1, 10**6), default=1000, show_default=True, help="Of a file, about.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to make.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def make(
    family: str,
    form: str | None,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    layers: int,
    dense_layers: int,
    seed: int,
    shard_mb: int,
    out: Path,
    as_json: bool,
) -> None:
    """Write a checkpoint that transformers loads, with seeded weights.

    transformers itself builds and writes the model; experts are then quantised. minimax_m3_vl has a tensor a matrix, as
    on the hub; its text model alone, minimax_m3_vl_text, has stacks of all experts. There is no tokenizer.
    """
    from epfuse.demo.checkpoint import RECIPES, make_checkpoint
    from epfuse.demo.settings import ModelSize

    delivery = Delivery()
    numbers = RECIPES[family].formats[0] if form is None else Checkpoint(form)
    size = ModelSize(hidden, intermediate, 2 * intermediate, dense_layers, layers, experts, top_k)
    with LateBar(f"{family} in {numbers.value}", in_bytes=True) as bar:
        nbytes = make_checkpoint(out, family, numbers, size, seed, shard_mb * 10**6, bar.advance)
    files = sorted(path.name for path in out.iterdir())
    with delivery.of(STDOUT):
        if as_json:
            made = {"folder": str(out), "family": family, "format": numbers.value, "bytes": nbytes, "files": files}
            click.echo(json.dumps(made, indent=2))
        else:
            click.echo(f"{out}: {family} in {numbers.value}, {nbytes / 1e6:.1f} MB of tensors, {len(files)} files")
    delivery.exit(passed=True)
