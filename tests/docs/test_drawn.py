"""The tables of drawn token counts in docs/performance.md against their records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import geometric_mean

import pytest
from tools.peer_layers import comparisons, layers_of

DOCS = Path(__file__).parents[2] / "docs"
SECTION = (DOCS / "performance.md").read_text().split("## At token counts and on layers that nobody tuned\n")[1]
SECTION = SECTION.split("\n## ")[0]
RECORDS = [
    DOCS / f"records/{name}.json"
    for name in (
        "2026-12-01-h200-drawn", "2026-12-01-h200-shapes",
        "2026-11-30-h200-shapes", "2026-11-30-h200-shapes-second", "2026-11-30-h200-shapes-first",
    )
]  # fmt: skip
Points = dict[tuple[str, int], tuple[float, str | None, float]]
"""Layer and T -> our microseconds, the fastest peer and its."""


def points() -> Points:
    """Of each layer, what the newest record has that compares it with a peer."""
    found: Points = {}
    for record in (json.loads(path.read_text()) for path in RECORDS if path.exists()):
        known = {layer for layer, _ in found}
        for layer in layers_of(record):
            own = comparisons([layer], "impl")
            if layer["layer"] not in known and any(peer for *_, peer, _ in own):
                found |= {(name, tokens): (us, peer, best) for name, tokens, us, peer, best in own}
    return found


def shown_points() -> dict[tuple[str, int], tuple[float, float | None]]:
    """Layer and T -> microseconds and the ratio, as the page has them."""
    found: dict[tuple[str, int], tuple[float, float | None]] = {}
    for part in SECTION.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
        if part.startswith("| tokens"):
            tokens, _, times, ratios = lines
            for count, us, ratio in zip(tokens[1:], times[1:], ratios[1:], strict=True):
                found["minimax-m3-ep8", int(count)] = float(us), None if ratio == "-" else float(ratio)
        elif part.startswith("| layer"):
            for name, *cells in lines[2:]:
                for count, us, ratio in re.findall(r"(\d+): ([\d.]+)(?: \(([\d.]+)\))?", " ".join(cells)):
                    found[name, int(count)] = float(us), float(ratio) if ratio else None
    return found


def test_every_point_of_the_records_is_shown_and_no_other() -> None:
    wanted, shown = points(), shown_points()
    assert wanted
    assert shown.keys() == wanted.keys()
    for key, (us, peer, best) in wanted.items():
        time, ratio = shown[key]
        assert time == round(us, 1)
        assert (ratio is None) == (peer is None)
        if ratio is not None:
            assert ratio == pytest.approx(us / best, abs=0.0051)


def test_every_point_that_lost_is_named() -> None:
    for (layer, tokens), (us, peer, best) in points().items():
        lost = f"on {layer} at {tokens} token{'s' * (tokens > 1)}: {us:.1f} us for {best:.1f}" in " ".join(
            SECTION.split()
        )
        assert lost is (peer is not None and us > best)


def test_the_means_and_the_worst_are_the_records() -> None:
    found = points()
    assert all(peer for _, peer, _ in found.values())
    drawn = [us / best for (layer, _), (us, _, best) in found.items() if layer == "minimax-m3-ep8"]
    others = [us / best for (layer, _), (us, _, best) in found.items() if layer != "minimax-m3-ep8"]
    words = " ".join(SECTION.split())
    assert f"with {geometric_mean(drawn):.3f} in the mean and {max(drawn):.3f} at most" in words
    assert f"with {geometric_mean(others):.3f} in the mean of {len(others)} and {max(others):.3f} at most" in words
    won = sum(ratio < 1 for ratio in drawn + others)
    readme = (DOCS.parent / "README.md").read_text()
    assert f"faster than every peer that was timed at {won} of {len(found)} drawn points" in readme
    assert {len(found), len({layer for layer, _ in found})} == {112, 13}
    assert "on thirteen ranks of ten models:" in readme
