"""Raw results: numbers are computed from the requests, and hostile files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epfuse.errors import ConfigError
from epfuse.serving.results import AnsweredRequest, percentile, read_result, steady_window


def raw(count: int = 40, concurrency: int = 4, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A result as vLLM's client writes it: a closed loop of ``concurrency`` requests."""
    rng = np.random.default_rng(seed)
    itls = [list(rng.uniform(0.01, 0.03, rng.integers(5, 9))) for _ in range(count)]
    ttfts = list(rng.uniform(0.05, 0.1, count))
    free = [100.0] * concurrency
    starts = []
    for ttft, gaps in zip(ttfts, itls, strict=True):
        slot = free.index(min(free))
        starts.append(free[slot])
        free[slot] += ttft + sum(gaps)
    content = {
        "duration": max(free) - 100.0,
        "completed": count,
        "input_lens": [int(n) for n in rng.integers(50, 64, count)],
        "output_lens": [len(gaps) + 1 for gaps in itls],
        "ttfts": ttfts,
        "itls": itls,
        "start_times": starts,
        "errors": [""] * count,
        "total_token_throughput": 1.0,  # a tool's own sums are not believed
    }
    return content | changes


def written(folder: Path, content: object) -> Path:
    path = folder / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_percentiles_are_numpy_s() -> None:
    values = sorted(np.random.default_rng(1).exponential(size=37))
    for share in (0.0, 50.0, 90.0, 99.0, 99.9, 100.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share), rel=1e-12)


def test_numbers_come_from_the_requests(tmp_path: Path) -> None:
    content = raw()
    found = read_result(written(tmp_path, content), 4)
    latencies = [t + sum(gaps) for t, gaps in zip(content["ttfts"], content["itls"], strict=True)]
    tpots = [sum(gaps) / len(gaps) for gaps in content["itls"]]
    for spread, values in (
        (found.ttft, content["ttfts"]),
        (found.tpot, tpots),
        (found.itl, [gap for gaps in content["itls"] for gap in gaps]),
        (found.e2el, latencies),
    ):
        assert spread is not None
        assert spread.mean == pytest.approx(np.mean(values))
        assert spread.std == pytest.approx(np.std(values))
        assert spread.percentiles[99.0] == pytest.approx(np.percentile(values, 99))
    tokens = sum(content["input_lens"]) + sum(content["output_lens"])
    assert found.total_throughput == pytest.approx(tokens / content["duration"])
    assert found.per_user == pytest.approx(1 / np.median(tpots))
    assert (found.completed, found.failed) == (40, 0)


def test_failed_requests_count_in_nothing_but_their_number(tmp_path: Path) -> None:
    content = raw()
    content["errors"][3] = "timeout"
    content["output_lens"][7] = 0
    content["ttfts"][3] = 1e6
    found = read_result(written(tmp_path, content), 4)
    assert (found.completed, found.failed) == (38, 2)
    assert found.ttft is not None
    assert found.ttft.percentiles[99.9] < 1


def test_the_steady_window_leaves_ramps_out() -> None:
    steady = [AnsweredRequest(0.5 * k, 0.1, (0.1,) * 9, 1.0, 10, 10) for k in range(40)]  # two in flight, at all times
    lone = [AnsweredRequest(-100.0, 0.1, (0.1,) * 9, 1.0, 10, 10), AnsweredRequest(100.0, 0.1, (0.1,) * 9, 1.0, 10, 10)]
    found = steady_window([*lone, *steady], 2)
    assert found is not None
    assert (found.start, found.end) == (0.5, 20.0)
    assert found.output == pytest.approx(20, rel=0.05)
    assert found.total == pytest.approx(40, rel=0.05)
    assert steady_window(steady[:4], 2) is None
    assert steady_window([], 2) is None
    assert steady_window([AnsweredRequest(None, 0.1, (), 0.1, 1, 1)], 1) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ttfts": None}, "ttfts: Input should be a valid list"),
        ({"ttfts": {}}, "ttfts: Input should be a valid list"),
        ({"ttfts": ["x"] * 40}, r"ttfts\.0: Input should be a valid number"),
        ({"ttfts": [float("nan")] * 40}, "finite number"),
        ({"ttfts": [float("inf")] * 40}, "finite number"),
        ({"ttfts": [-1.0] * 40}, "greater than or equal to 0"),
        ({"ttfts": [True] * 40}, "valid number"),
        ({"ttfts": [0.1] * 39}, "input_lens has 40 values; ttfts has 39"),
        ({"itls": [1.0] * 40}, r"itls\.0: Input should be a valid list"),
        ({"itls": [["x"]] * 40}, r"itls\.0\.0: Input should be a valid number"),
        ({"output_lens": [1.5] * 40}, "output_lens.*valid integer"),
        ({"output_lens": [1 << 70] * 40}, "output_lens.*less than"),
        ({"duration": 0}, "duration: .*greater than 0"),
        ({"duration": None}, "duration: Input should be a valid number"),
        ({"duration": "1"}, "duration: Input should be a valid number"),
        ({"latencies": [1e-6] * 40}, "less than its ttft"),
        ({"errors": ["all"] * 40}, "no request that was answered"),
        ({"ttfts": [], "itls": [], "input_lens": [], "output_lens": [], "start_times": [], "errors": []}, "no request"),
    ],
)
def test_wrong_values_are_refused_by_file_and_key(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        read_result(written(tmp_path, raw(**change)), 4)
    assert "result.json" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"ttfts": [1', "\x00" * 100, "[" * 100_000])
def test_torn_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"result\.json"):
        read_result(written(tmp_path, text), 4)
