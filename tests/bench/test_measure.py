from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

from epfuse.bench import measure
from epfuse.bench.measure import MOST_CALLS, Sampling, Timing, TimingMethod, time_calls

CPU = torch.device("cpu")


def test_statistics() -> None:
    timing = Timing.of([5e-3, 1e-3, 2e-3, 4e-3, 3e-3], 10, TimingMethod.GRAPH)
    assert timing.median_us == pytest.approx(300.0)
    assert (timing.q1_us, timing.q3_us) == (pytest.approx(200.0), pytest.approx(400.0))
    assert (timing.min_us, timing.max_us) == (pytest.approx(100.0), pytest.approx(500.0))
    assert (timing.samples, timing.calls, timing.method) == (5, 10, "graph")
    assert timing.spread_us == pytest.approx(200.0)


def test_one_sample_has_no_spread() -> None:
    timing = Timing.of([2e-6], 1, TimingMethod.PLAIN)
    assert timing.median_us == timing.q1_us == timing.q3_us == timing.max_us == pytest.approx(2.0)


class Turns:
    """Calls that note their turn, on a clock on which each takes 1 ms."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        self.calls = [partial(self.call, index) for index in range(count)]
        monkeypatch.setattr(measure, "elapsed", self.elapsed)

    def call(self, index: int) -> torch.Tensor:
        self.made.append(index)
        return torch.full((1,), float(index))

    def elapsed(self, run: Callable[[], None], device: torch.device) -> float:
        before = len(self.made)
        run()
        return (len(self.made) - before) * 1e-3


def test_calls_are_repeated_until_a_sample_is_long_enough_and_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(2, monkeypatch)
    measured = time_calls(turns.calls, CPU, Sampling(samples=4, seconds=0.02), TimingMethod.PLAIN)
    assert measured.timing.median_us == pytest.approx(1000.0)
    assert measured.timing.calls == 20
    assert measured.timing.samples == 4
    assert turns.made == [0, 1] * (len(turns.made) // 2)
    assert [float(output) for output in measured.outputs] == [0.0, 1.0]


def test_a_sample_has_a_limited_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(3, monkeypatch)
    measured = time_calls(turns.calls, CPU, Sampling(samples=1, seconds=1e3), TimingMethod.PLAIN)
    assert measured.timing.calls == MOST_CALLS // 3 * 3


def test_outputs_are_what_the_timed_calls_write() -> None:
    out, turns = torch.zeros(2), itertools.count()

    def forgets() -> torch.Tensor:
        if next(turns) == 0:  # only the first call, which is the one that is checked before, writes everything
            out[1] = 1.0
        out[0] = 1.0
        return out

    forgets()
    measured = time_calls([forgets], CPU, Sampling(samples=2, seconds=1e-6), TimingMethod.PLAIN)
    assert measured.outputs[0][0] == 1.0
    assert measured.outputs[0][1].isnan()


def test_time_on_a_cpu_is_positive() -> None:
    a = torch.randn(64, 64)
    measured = time_calls([lambda: a @ a], CPU, Sampling(samples=3, seconds=1e-3), TimingMethod.PLAIN)
    timing = measured.timing
    assert 0 < timing.min_us <= timing.q1_us <= timing.median_us <= timing.q3_us <= timing.max_us
    assert timing.method == "plain"


@pytest.mark.gpu
def test_a_graph_is_timed_and_leaves_its_results(device: torch.device) -> None:
    a = torch.randn(64, 64, device=device)
    measured = time_calls([lambda: a @ a, lambda: a + a], device, Sampling(samples=3, seconds=1e-3), TimingMethod.GRAPH)
    assert measured.timing.method == "graph"
    assert torch.equal(measured.outputs[1], a + a)
