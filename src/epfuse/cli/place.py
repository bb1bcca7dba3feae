"""``epfuse place``: which rank should hold which experts, from a measured load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.errors import ConfigError, EpfuseError

if TYPE_CHECKING:
    from epfuse.parallel.placement import ExpertPlacement

MOST_LAYERS = 4096
MOST_EXPERTS = 4096
"""Of a layer; the search compares every two of two ranks' experts."""

EPILOG = """\b
LOAD is a JSON file: how often each expert was chosen, [120, 7, ...], or that for each layer, {"0": [120, 7, ...], ...}.

\b
Examples:
  epfuse place load.json --ranks 8
  epfuse place load.json --ranks 8 --redundant 16 --json > placement.json
"""


@click.command(epilog=EPILOG)
@click.argument("load", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ranks", type=click.IntRange(1, 4096), required=True, metavar="P", help="Ranks that share each layer.")
@click.option(
    "--redundant",
    type=click.IntRange(0, 4096),
    default=0,
    show_default=True,
    metavar="N",
    help="Slots a layer for copies of its busiest experts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the placements as JSON instead of the table.")
def place(load: Path, ranks: int, redundant: int, as_json: bool) -> None:
    """Place a model's experts on ranks by a measured load, and say how uneven the ranks are before and after.

    Imbalance is the busiest rank's load over the mean of the ranks: the others wait for that one. The JSON has, for
    each layer, the experts in each rank's slots, which epfuse.parallel.placement.ExpertPlacement takes.
    """
    from rich.progress import track

    from epfuse.parallel.balance import balanced
    from epfuse.parallel.placement import ExpertPlacement, imbalance
    from epfuse.report.terminal import Console

    layers, delivery = _read(load), Delivery()
    found: list[dict[str, Any]] = []
    for name, counts in track(
        layers.items(), "placing", console=Console(stderr=True), transient=True, disable=len(layers) < 2
    ):
        try:
            placement = balanced(counts, ranks, redundant)
        except EpfuseError as error:
            raise ConfigError(f"layer {name}: {error}") from None
        before: dict[str, ExpertPlacement] = {
            "contiguous": ExpertPlacement.contiguous(len(counts), ranks),
            "strided": ExpertPlacement.strided(len(counts), ranks),
        }
        found.append(
            {
                "layer": name,
                "imbalance": {key: imbalance(one, counts) for key, one in (before | {"balanced": placement}).items()},
                "held": placement.held,
            }
        )
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps({"ranks": ranks, "redundant": redundant, "layers": found}, indent=2))
        else:
            _show(found, ranks, redundant)
    delivery.exit(passed=True)


def _show(found: list[dict[str, Any]], ranks: int, redundant: int) -> None:
    from epfuse.report.terminal import Console, figures, make_table

    console = Console()
    console.print(
        f"{ranks} ranks, {redundant} redundant slots a layer. Imbalance: the busiest rank's load over the mean.",
        highlight=False,
    )
    table = make_table("layer", *map(figures, ("contiguous", "strided", "balanced")))
    for layer in found:
        table.add_row(layer["layer"], *(f"{value:.3f}" for value in layer["imbalance"].values()))
    console.print(table)


def _read(path: Path) -> dict[str, list[float]]:
    """The loads in a file, by layer."""
    from pydantic import Field, TypeAdapter, ValidationError

    from epfuse.errors import first_fault
    from epfuse.input_file import read_json

    count = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    layer = Annotated[list[count], Field(min_length=1, max_length=MOST_EXPERTS)]
    adapter: TypeAdapter[dict[str, list[float]]] = TypeAdapter(dict[str, layer])
    value = read_json(path, "load")
    layers = value if isinstance(value, dict) else {"0": value}
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise ConfigError(f"load {path} has {len(layers)} layers; it must have 1 to {MOST_LAYERS}")
    try:
        return adapter.validate_python(layers)
    except ValidationError as error:
        where, what = first_fault(error, "the load")
        raise ConfigError(f"load {path}, {where}: {what}") from None
