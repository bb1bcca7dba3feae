"""What docs/performance.md says of the counters of an H200 against their record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
RECORD = json.loads((DOCS / "records/2026-11-30-h200-counters.json").read_text())
SECTION = (DOCS / "performance.md").read_text().split("### Where the time over the marks goes\n")[1].split("\n## ")[0]
Kernel = dict[str, Any]


def gemms(point: dict[str, Any]) -> list[Kernel]:
    return [one for one in point["counters"] if "gate_up" in one["kernel"] or "down" in one["kernel"]]


def alone(kernels: list[Kernel]) -> float:
    return float(sum(one["us"] for one in kernels))


def mean(kernels: list[Kernel], name: str) -> float:
    """Weighted by the kernels' times."""
    return float(sum(one[name] * one["us"] for one in kernels)) / alone(kernels)


def points(path: str) -> list[dict[str, Any]]:
    return [point for point in RECORD["points"] if point["path"] == path]


@pytest.mark.parametrize("path", ["w8a16", "w8a8"])
def test_the_table_has_the_record_s_counters(path: str) -> None:
    table = next(part for part in SECTION.split("\n\n") if f"| `{path}`: GEMMs alone, us |" in part)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "---" not in line]
    shown = {line[0].removeprefix(f"`{path}`: "): list(map(float, line[1:])) for line in lines}
    assert shown["tokens"] == [point["tokens"] for point in points(path)]
    for index, point in enumerate(points(path)):
        own = gemms(point)
        for one in own:
            one["active"] = 100 * one["active_cycles"] / one["cycles"]
        moved = sum(one["read_mb"] + one["written_mb"] for one in own)
        assert shown["GEMMs alone, us"][index] == pytest.approx(alone(own), abs=0.51)
        assert shown["read and written, TB/s"][index] == pytest.approx(moved / alone(own), abs=0.0051)
        assert shown["tensor cores busy, %"][index] == pytest.approx(mean(own, "tensor_percent"), abs=0.51)
        assert shown["multiprocessors with a program, %"][index] == pytest.approx(mean(own, "active"), abs=0.51)
        rest = alone(point["counters"]) - alone(own)
        assert shown["other kernels alone, us"][index] == pytest.approx(rest, abs=0.51)


def test_the_sentences_have_the_record_s_figures() -> None:
    by = {(point["path"], point["tokens"]): point for point in RECORD["points"]}
    sums = [round(alone(by["w8a16", tokens]["counters"])) for tokens in (8192, 16384)]
    assert f"add up to {sums[0]} and {sums[1]} us" in SECTION
    times = [round(alone(gemms(by["w8a8", tokens]))) for tokens in (4096, 8192, 16384)]
    assert "take {}, {} and {} us, as much".format(*times) in SECTION
    dense = [gemms(by["bf16", tokens]) for tokens in (4096, 8192)]
    assert "{:.0f} and {:.0f} us of GEMMs alone".format(*map(alone, dense)) in " ".join(SECTION.split())
    read = [sum(one["read_mb"] for one in kernels) / 1e3 for kernels in dense]
    assert "They read {:.2f} and {:.2f} GB".format(*read) in SECTION
    one_launch = gemms(by["w8a16", 2048])
    names = ("memory_percent", "tensor_percent", "issue_percent", "l2_percent")
    assert [round(mean(one_launch, name)) for name in names] == [70, 51, 43, 83]
    busy = [one["active_cycles"] / one["cycles"] for one in gemms(by["w8a16", 16])]
    assert busy == [pytest.approx(0.71, abs=0.015)] * 2
