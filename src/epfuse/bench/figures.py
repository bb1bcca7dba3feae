"""A record's figures as text, the same on a terminal and on a page."""

from __future__ import annotations

from typing import Any

from epfuse.bench.compare import RowChange
from epfuse.bench.record import BenchRecord, BenchRow
from epfuse.bench.roofline import Roofs


def row_figures(record: BenchRecord, routing: str, tokens: int) -> list[dict[str, Any]]:
    """The rows of one point, each figure as text."""
    rows = record.at(routing, tokens)
    times = [row.time.median_us for row in rows if row.time]
    return [_figures(record, row, fastest=bool(row.time and row.time.median_us == min(times))) for row in rows]


def _figures(record: BenchRecord, row: BenchRow, fastest: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "tokens": row.tokens,
        "label": row.label,
        "error": "" if row.relative_error is None else f"{row.relative_error:.1e}",
        "failed": row.time is None,
        "failure": row.failure or "",
        "wrong": not row.ok,
        "fastest": fastest,
    }
    if row.time is None:
        return figures
    seconds, unit = row.time.median_us * 1e-6, unit_of(record)[0]
    over_peer = record.over_best_peer(row)
    return figures | {
        "us": _us(row.time.median_us),
        "quartiles": f"{_us(row.time.q1_us)}..{_us(row.time.q3_us)}",
        "of_floor": "" if row.over_floor is None else f"{row.over_floor:.2f}x",
        "bandwidth": f"{row.weight_bytes / seconds / unit:.2f}",
        "throughput": f"{row.flops / seconds / unit:.1f}",
        "over_best_peer": "" if over_peer is None else f"{over_peer:.2f}x",
    }


def unit_of(record: BenchRecord) -> tuple[float, str]:
    """What bandwidths and FLOP rates of this device are shown in: (factor, prefix)."""
    return (1e12, "T") if (record.roofs.read.rate or 0.0) >= 2e11 else (1e9, "G")


def change_figures(change: RowChange) -> dict[str, str]:
    """One changed row as text."""
    row, before, after = change.row, change.before, change.after
    ratio, then = change.ratio, before.time.median_us if before and before.time else None
    return {
        "what": f"{row.label}, T={row.tokens}, {row.routing}",
        "before": "" if then is None else _us(then),
        "after": _us(after.time.median_us) if after and after.time else "",
        "change": "" if ratio is None else f"{100 * (ratio - 1):+.1f} %",
        "noise": "" if change.noise_us is None or not then else f"{100 * change.noise_us / then:.1f} %",
        "verdict": change.verdict.value,
    }


def describe_roofs(roofs: Roofs) -> list[tuple[str, str]]:
    """(what, rate) of each roof that was measured."""
    found = []
    if roofs.read.rate:
        found.append(("memory read", _scaled(roofs.read.rate, "B/s")))
    for operand, roof in roofs.matmul.items():
        if roof.rate:
            found.append((f"{operand.value} matmul", _scaled(roof.rate, "FLOP/s")))
    return found


def environment_of(record: BenchRecord) -> list[tuple[str, str]]:
    """What the numbers depend on, as (name, text)."""
    run, device = record.run, record.device
    found = [("command", run.get("command")), ("date", run.get("date")), ("seed", run.get("seed"))]
    found.append(
        ("device", f"{device.get('name')} ({device.get('target')}), {device.get('compute_units')} compute units")
    )
    for when, clocks in (run.get("clocks") or {}).items():
        if clocks:
            text = f"SM {clocks['sm_mhz']} of {clocks['max_sm_mhz']} MHz, memory {clocks['memory_mhz']} MHz"
            found.append((f"clocks {when}", f"{text}, {clocks['temperature_c']} °C, limit {clocks['power_limit_w']} W"))
            found.append(("driver", clocks["driver"]))
    commit = run.get("commit")
    if commit:
        found.append(("commit", f"{commit['hash']}{' and changes' if commit['changed'] else ''}"))
    found += [(name, version) for name, version in (run.get("versions") or {}).items()]
    found += [(f"roof: {name}", roof["method"]) for name, roof in record.roofs.to_json().items()]
    return [(name, str(value)) for name, value in dict(found).items() if value is not None]


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 10_000 else f"{value:,.0f}"


def _scaled(rate: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G")):
        if rate >= factor:
            return f"{_three_digits(rate / factor)} {prefix}{unit}"
    return f"{_three_digits(rate / 1e6)} M{unit}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
