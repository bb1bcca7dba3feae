"""The record as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epfuse.bench.compare import RecordComparison, RowVerdict
from epfuse.bench.figures import change_figures, describe_roofs, row_figures, unit_of
from epfuse.bench.record import BenchRecord
from epfuse.report.terminal import figures, make_table

NARROW = 100
"""Columns of a terminal below which two figures share one."""
COLOURS = {
    RowVerdict.FASTER: "green",
    RowVerdict.MENDED: "green",
    RowVerdict.SLOWER: "red",
    RowVerdict.BROKEN: "bold red",
}


def print_record(record: BenchRecord, comparison: RecordComparison | None, console: Console) -> None:
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
        console.print(_table(record, routing, is_narrow=console.width < NARROW))
    for peer in record.absent:
        console.print(f"absent: {peer.name}: {peer.reason}", markup=False, highlight=False)
    for row in record.rows:
        if row.failure is not None:
            verdict = "failed" if row.ok else "FAIL"
            where = f"{row.label}, T={row.tokens}, {row.routing}"
            console.print(f"{verdict}: {where}: {row.failure}", markup=False, highlight=False)
    if comparison is not None:
        _print_comparison(comparison, console)


def _table(record: BenchRecord, routing: str, is_narrow: bool) -> Table:
    prefix = unit_of(record)[1]
    names = ["us", "quartiles", "/ floor", f"{prefix}B/s", f"{prefix}FLOP/s", "/ best peer", "error"]
    shown = _stacked(names) if is_narrow else names
    table = make_table(figures("T"), "path or peer", *map(figures, shown), title=f"{routing} routing")
    counts = dict.fromkeys(row.tokens for row in record.rows if row.routing == routing)
    for tokens in counts:
        rows = row_figures(record, routing, tokens)
        for index, row in enumerate(rows):
            first, last = str(tokens) if index == 0 else "", index == len(rows) - 1
            if row["failed"]:
                cells = ["WRONG" if row["wrong"] and row["error"] else "failed", "", "", "", "", ""]
            else:
                us = f"[bold]{row['us']}[/]" if row["fastest"] else row["us"]
                keys = ("quartiles", "of_floor", "bandwidth", "throughput", "over_best_peer")
                cells = [us, *(row[key] for key in keys)]
            cells.append(row["error"])
            table.add_row(first, escape(row["label"]), *(_stacked(cells) if is_narrow else cells), end_section=last)
    return table


def _stacked(cells: list[str]) -> list[str]:
    """A row for narrow terminals: the quartiles below the median, the FLOPs below the bytes."""
    us, quartiles, floor, bandwidth, throughput, peer, error = cells
    below = "\n".join
    return [below((us, quartiles)), floor, below((bandwidth, throughput)), peer, error]


def _print_comparison(comparison: RecordComparison, console: Console) -> None:
    changed = [change for change in comparison.changes if change.changed]
    date = comparison.before.run.get("date")
    console.print(f"\ncompared with the record of {date}:", highlight=False)
    if comparison.other_device:
        name = escape(str(comparison.before.device.get("name")))
        console.print(f"[yellow]it is from another device, {name}: what changed is not the code alone[/]")
    if changed:
        table = make_table("row", *map(figures, ("before, us", "now, us", "change", "noise")), "verdict")
        for change in changed:
            f, colour = change_figures(change), COLOURS.get(change.verdict, "yellow")
            table.add_row(
                escape(f["what"]), f["before"], f["after"], f["change"], f["noise"], f"[{colour}]{f['verdict']}[/]"
            )
        console.print(table)
    same = len(comparison.changes) - len(changed)
    console.print(f"{same} of {len(comparison.changes)} rows did not change by more than the noise", highlight=False)
