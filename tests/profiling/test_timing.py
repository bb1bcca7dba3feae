"""Union, gaps and percentiles; exact, because times are integers."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse.profiling.events import TracedKernel, TracedLaunch
from epfuse.profiling.timing import Gaps, busy, length, pauses, percentile, streams_of, union

ACTIVITIES = st.lists(
    st.builds(
        lambda stream, start, duration, correlation: TracedKernel("k", 0, stream, start, duration, correlation),
        st.integers(0, 2),
        st.integers(0, 300),
        st.integers(0, 50),
        st.none() | st.integers(0, 9),
    ),
    min_size=1,
    max_size=30,
).map(lambda kernels: sorted(kernels, key=lambda k: (k.start, k.stream)))
LAUNCHES = st.dictionaries(
    st.integers(0, 9),
    st.builds(lambda t, d: TracedLaunch("launch", "1", t, d), st.integers(-50, 400), st.integers(0, 40)),
)


@given(ACTIVITIES)
def test_union_is_the_set_of_times(kernels: list[TracedKernel]) -> None:
    covered = {t for k in kernels for t in range(k.start, k.end)}
    assert busy(kernels) == len(covered) <= sum(k.duration for k in kernels)
    merged = union((k.start, k.end) for k in kernels)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    assert length(merged) == len(covered)


@given(ACTIVITIES)
def test_pauses_are_what_no_activity_covers(kernels: list[TracedKernel]) -> None:
    covered = {t for k in kernels for t in range(k.start, k.end)}
    whole = range(min(k.start for k in kernels), max(k.end for k in kernels))
    found = pauses(reversed(kernels))
    assert [t for pause in found for t in range(pause.start, pause.end)] == sorted(set(whole) - covered)
    assert all(pause.before in kernels and pause.duration > 0 for pause in found)
    assert all(a.end <= b.start for a, b in pairwise(found))


@given(ACTIVITIES, LAUNCHES)
def test_a_stream_is_busy_or_in_a_gap(kernels: list[TracedKernel], launches: dict[int, TracedLaunch]) -> None:
    streams = streams_of(kernels, [], launches)
    for time in streams:
        own = [k for k in kernels if k.stream == time.stream]
        assert time.kernels == len(own)
        assert time.busy + time.gaps.total == max(k.end for k in own) - own[0].start
        assert min(time.gaps.host_late, time.gaps.launch, time.gaps.device, time.gaps.unknown) >= 0
    assert sum(time.busy for time in streams) >= busy(kernels)


@pytest.mark.parametrize(
    ("launch", "gaps"),
    [
        ((130, 5), Gaps(host_late=30, launch=5, device=15)),  # called late, returned, then the device waited
        ((90, 4), Gaps(device=50)),  # queued long before
        ((90, 30), Gaps(launch=20, device=30)),  # the call was under way when the stream ran dry
        ((140, 50), Gaps(host_late=40, launch=10)),  # the kernel started before the call returned
        ((160, 5), Gaps(host_late=50)),  # clocks disagree: the launch seems to come after the start
        (None, Gaps(unknown=50)),
    ],
)
def test_why_a_stream_waits(launch: tuple[int, int] | None, gaps: Gaps) -> None:
    kernels = [TracedKernel("a", 0, 7, 0, 100, None), TracedKernel("b", 0, 7, 150, 10, 1)]
    launches = {1: TracedLaunch("cudaLaunchKernel", "1", *launch)} if launch else {}
    (stream,) = streams_of(kernels, [], launches)
    assert stream.gaps == gaps


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=50), st.sampled_from([1, 50, 95, 99]))
def test_percentiles_are_those_of_statistics(values: list[int], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(values, percent / 100) == pytest.approx(expected)
    assert percentile(values[:1], percent / 100) == values[0]
