from __future__ import annotations

import pytest

from epfuse.bench.compare import RowVerdict, compare_records, judge
from epfuse.bench.layers import LAYERS
from epfuse.bench.record import BenchRow
from epfuse.errors import ConfigError
from tests.bench.records import peer, record, row


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (row(us=300), row(us=310), RowVerdict.SLOWER),
        (row(us=300), row(us=290), RowVerdict.FASTER),
        (row(us=300), row(us=305), RowVerdict.SAME),  # below 2 %
        (row(us=300, spread=8), row(us=310, spread=8), RowVerdict.SAME),  # below both spreads together
        (row(us=300, spread=8), row(us=317, spread=8), RowVerdict.SLOWER),
        (row(us=300), row(us=None), RowVerdict.BROKEN),
        (row(us=None), row(us=300), RowVerdict.MENDED),
        (row(us=None), row(us=None), RowVerdict.FAILS),
        (None, row(), RowVerdict.NEW),
        (row(), None, RowVerdict.GONE),
    ],
)
def test_verdicts(before: BenchRow | None, after: BenchRow | None, verdict: RowVerdict) -> None:
    change = judge(before, after)
    assert change.verdict is verdict
    assert change.changed is (verdict not in (RowVerdict.SAME, RowVerdict.FAILS))


def test_noise_and_ratio() -> None:
    change = judge(row(us=300, spread=8), row(us=330, spread=4))
    assert change.noise_us == pytest.approx(12.0)
    assert change.ratio == pytest.approx(1.1)
    assert judge(row(us=300, spread=1), row(us=300, spread=1)).noise_us == pytest.approx(6.0)


def test_rows_are_matched_by_contender_weights_routing_and_tokens() -> None:
    before = record(row(us=100), row(tokens=1), row(weights="mxfp8"), row(routing="zipf:1.2", us=200))
    after = record(row(routing="zipf:1.2", us=300), row(us=100), row("bf16"))
    found = {change.row.key: change.verdict for change in compare_records(before, after).changes}
    assert found == {
        ("w8a16", "fragment", "zipf:1.2", 64): RowVerdict.SLOWER,
        ("w8a16", "fragment", "uniform", 64): RowVerdict.SAME,
        ("bf16", "fragment", "uniform", 64): RowVerdict.NEW,
        ("w8a16", "fragment", "uniform", 1): RowVerdict.GONE,
        ("w8a16", "mxfp8", "uniform", 64): RowVerdict.GONE,
    }


def test_a_slower_peer_is_no_regression() -> None:
    before = record(row(us=100), peer("vLLM Marlin", 100))
    assert compare_records(before, record(row(us=100), peer("vLLM Marlin", 200))).slower == []
    (change,) = compare_records(before, record(row(us=200), peer("vLLM Marlin", 100))).slower
    assert change.to_json() == {
        "contender": "w8a16",
        "weights": "fragment",
        "routing": "uniform",
        "tokens": 64,
        "verdict": "slower",
        "before_us": 100,
        "after_us": 200,
        "ratio": 2.0,
        "noise_us": 2.0,
    }


def test_another_device_is_said() -> None:
    elsewhere = record(row(), device={"name": "GPU 9001"})
    assert compare_records(record(row()), elsewhere).other_device
    assert not compare_records(record(row()), record(row())).other_device


def test_records_of_other_layers() -> None:
    with pytest.raises(ConfigError, match=r"the older record is of minimax-m3-ep8.*this run is of minimax-m3-ep4"):
        compare_records(record(row()), record(row(), layer=LAYERS["minimax-m3-ep4"]))
