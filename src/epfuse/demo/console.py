"""The demo's record as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epfuse.demo.padding import GLOBAL_TILE
from epfuse.demo.record import CheckVerdict, DemoCheck, DemoRecord
from epfuse.report.terminal import figures, make_table

COLOURS = {CheckVerdict.PASSED: "green", CheckVerdict.FAILED: "bold red", CheckVerdict.INFORMATIVE: "yellow"}


def print_record(record: DemoRecord, console: Console) -> None:
    """Print what ran, a row for each layer, the checks, and the outcome."""
    settings, size = record.settings, record.settings["size"]
    console.print(
        f"MiniMax-M3 text model, {size['dense_layers']} dense + {size['moe_layers']} MoE layers, {settings['dtype']},"
        f" {settings['weights']} experts,"
        f" reads {record.text['tokens']} tokens of {escape(record.text['source'])}"
    )
    console.print(
        f"{settings['ranks']} ranks ({record.environment['backend']}, {record.environment['placement']}),"
        f" {size['experts'] // settings['ranks']} of {size['experts']} experts each\n"
    )
    console.print(layer_table(record))
    console.print(check_table(record.checks))
    if record.true_size is not None:
        big = record.true_size
        console.print(
            f"one layer at true size, {big.tokens} tokens, {big.local_routes} local routes, on {escape(big.device)}:"
            f" max error {big.error:.2e} (outputs up to {big.scale:.2f}), {1000 * big.seconds:.2f} ms a call"
        )
    console.print("[green]all checks passed[/]" if record.passed else "[bold red]a check failed[/]")


def layer_table(record: DemoRecord) -> Table:
    """Per layer: routes, a rank's local ones, its rows in blocks of BLOCK_M and in global 64-row tiles, max error."""
    names = ("routes", "local routes", f"blocks of {record.block_m}", f"{GLOBAL_TILE}-row tiles", "max error")
    table = make_table("", *map(figures, names), title="Rows a rank, min / mean / max over the ranks")
    for layer in record.layers:
        table.add_row(
            layer.label,
            str(layer.routes),
            _spread(layer.useful_rows),
            _spread(layer.padded_rows),
            str(layer.global_rows),
            f"{layer.error:.1e}",
        )
    return table


def check_table(checks: list[DemoCheck]) -> Table:
    """One row a check."""
    table = make_table("check", figures("measured"), figures("allowed"), "verdict", title="Checks")
    for check in checks:
        colour = COLOURS[check.verdict]
        table.add_row(
            check.name,
            _number(check.measured),
            _number(check.allowed),
            f"[{colour}]{check.verdict}[/]",
        )
    return table


def _spread(values: list[int]) -> str:
    return f"{min(values)} / {sum(values) / len(values):.0f} / {max(values)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
