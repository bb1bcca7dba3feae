"""Placements from a load: every expert, as many slots as asked for, and a busiest rank that is less busy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.cli.main import main
from epfuse.errors import ConfigError, ShapeError
from epfuse.parallel.balance import balanced
from epfuse.parallel.placement import ExpertPlacement, imbalance

ZIPF = [1000 // (expert + 1) for expert in range(32)]
"""A skewed router's load, busiest first: contiguous placement is at its worst."""


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_every_expert_is_placed_and_slots_are_shared_out(load: list[int], ranks: int, data: st.DataObject) -> None:
    redundant = data.draw(st.integers(0, min(12, len(load) * (ranks - 1))))
    placement = balanced(load, ranks, redundant)
    counts = Counter(expert for own in placement.held for expert in own)
    assert set(counts) == set(range(len(load)))
    sizes = [len(own) for own in placement.held]
    assert sum(sizes) == len(load) + redundant
    assert max(sizes) - min(sizes) <= 1
    assert max(counts.values()) <= ranks
    if not redundant:
        for make in (ExpertPlacement.contiguous, ExpertPlacement.strided):
            assert imbalance(placement, load) <= imbalance(make(len(load), ranks), load)


def test_a_skewed_load_becomes_even_and_copies_make_it_more_so() -> None:
    found = [imbalance(ExpertPlacement.contiguous(32, 8), ZIPF)]
    found += [imbalance(balanced(ZIPF, 8, redundant), ZIPF) for redundant in (0, 8, 32)]
    assert found[0] > 4
    assert found == sorted(found, reverse=True)
    least = ZIPF[0] + sum(ZIPF[-3:])  # the busiest expert alone has more than the mean, and three stand beside it
    assert found[1] == pytest.approx(8 * least / sum(ZIPF))
    assert found[2] < 1.1
    assert found[3] < 1.05


def test_copies_of_an_expert_are_on_different_ranks() -> None:
    placement = balanced(ZIPF, 8, 16)
    assert all(len(set(own)) == len(own) for own in placement.held)


def test_what_can_not_be_placed_is_refused() -> None:
    with pytest.raises(ConfigError, match="redundant is 5; 4 experts on 2 ranks can have 4 more copies"):
        balanced([1, 2, 3, 4], 2, 5)
    with pytest.raises(ShapeError, match="load has 0 numbers"):
        balanced([], 2)
    with pytest.raises(ConfigError, match="load of expert 1 is inf"):
        balanced([1, float("inf")], 2)


def invoke(path: Path, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["place", str(path), *options])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_the_imbalance_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"3": ZIPF, "4": ZIPF[::-1]}))
    code, out, _ = invoke(path, "--ranks", "8")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["3"])
    assert [float(value) for value in row[1:]] == [
        pytest.approx(imbalance(placement, ZIPF), abs=1e-3)
        for placement in (ExpertPlacement.contiguous(32, 8), ExpertPlacement.strided(32, 8), balanced(ZIPF, 8))
    ]


def test_its_json_is_a_placement(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps(ZIPF))
    code, out, _ = invoke(path, "--ranks", "8", "--redundant", "8", "--json")
    assert code == 0
    (layer,) = json.loads(out)["layers"]
    placement = ExpertPlacement(tuple(map(tuple, layer["held"])))
    assert placement == balanced(ZIPF, 8, 8)
    assert layer["imbalance"]["balanced"] == imbalance(placement, ZIPF)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("3", "0: Input should be a valid list"),
        ("[]", "0: List should have at least 1 item"),
        ("{}", "has 0 layers"),
        ('{"a": [1, -1]}', "a.1: Input should be greater than or equal to 0"),
        ('{"a": [1, NaN]}', "a.1: Input should be a finite number"),
        ('{"a": [1, "2"]}', "a.1: Input should be a valid number"),
        ('{"a": [1]}', "layer a: redundant is 9; 1 experts on 2 ranks can have 1 more copies"),
    ],
)
def test_a_file_that_is_no_load_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "load.json"
    path.write_text(text)
    code, out, err = invoke(path, "--ranks", "2", "--redundant", "9")
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
