"""The record as tables on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epfuse.bench.compare import Comparison, Verdict
from epfuse.bench.figures import change_figures, describe_roofs, row_figures, unit_of
from epfuse.bench.record import Record

COLOURS = {
    Verdict.FASTER: "green",
    Verdict.MENDED: "green",
    Verdict.SLOWER: "red",
    Verdict.BROKEN: "bold red",
}


def print_record(record: Record, comparison: Comparison | None, console: Console) -> None:
    """Print what ran where, the roofs, a table for each routing, who was absent, what changed."""
    shape = record.layer.shape
    console.print(
        f"{escape(record.layer.name)}: H={shape.hidden} I={shape.intermediate} L={shape.local_experts} of"
        f" E={shape.experts} K={shape.top_k}, on {escape(str(record.device.get('name')))}",
        highlight=False,
    )
    roofs = ", ".join(f"{name} {rate}" for name, rate in describe_roofs(record.roofs))
    console.print(f"roofs, measured: {roofs}\n", highlight=False)
    for routing in record.routings:
        console.print(_table(record, routing))
    for peer in record.absent:
        console.print(f"absent: {peer.name}: {peer.reason}", markup=False, highlight=False)
    for row in record.rows:
        if row.failure is not None:
            verdict = "failed" if row.ok else "FAIL"
            where = f"{row.label}, T={row.tokens}, {row.routing}"
            console.print(f"{verdict}: {where}: {row.failure}", markup=False, highlight=False)
    if comparison is not None:
        _print_comparison(comparison, console)


def _table(record: Record, routing: str) -> Table:
    prefix = unit_of(record)[1]
    table = Table(title=f"{routing} routing", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("T", justify="right")
    table.add_column("path or peer")
    for name in ("us", "quartiles", "/ floor", f"{prefix}B/s", f"{prefix}FLOP/s", "/ best peer", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    counts = dict.fromkeys(row.tokens for row in record.rows if row.routing == routing)
    for tokens in counts:
        rows = row_figures(record, routing, tokens)
        for index, row in enumerate(rows):
            first, last = str(tokens) if index == 0 else "", index == len(rows) - 1
            if row["failed"]:
                cells = ["WRONG" if row["wrong"] and row["error"] else "failed", "", "", "", "", ""]
            else:
                us = f"[bold]{row['us']}[/]" if row["fastest"] else row["us"]
                names = ("quartiles", "of_floor", "bandwidth", "throughput", "over_best_peer")
                cells = [us, *(row[name] for name in names)]
            table.add_row(first, escape(row["label"]), *cells, row["error"], end_section=last)
    return table


def _print_comparison(comparison: Comparison, console: Console) -> None:
    changed = [change for change in comparison.changes if change.changed]
    date = comparison.before.run.get("date")
    console.print(f"\ncompared with the record of {date}:", highlight=False)
    if comparison.other_device:
        name = escape(str(comparison.before.device.get("name")))
        console.print(f"[yellow]it is from another device, {name}: what changed is not the code alone[/]")
    if changed:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("row")
        for name in ("before, us", "now, us", "change", "noise"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict")
        for change in changed:
            f, colour = change_figures(change), COLOURS.get(change.verdict, "yellow")
            table.add_row(
                escape(f["what"]), f["before"], f["after"], f["change"], f["noise"], f"[{colour}]{f['verdict']}[/]"
            )
        console.print(table)
    same = len(comparison.changes) - len(changed)
    console.print(f"{same} of {len(comparison.changes)} rows did not change by more than the noise", highlight=False)
