"""What a server's log says of layers whose weights are taken over: few lines, and the last one always."""

from __future__ import annotations

import logging

import pytest

from epfuse.integrations import loading
from epfuse.integrations.loading import LoadingLog


class Method:
    """Stands for a server's object of one layer."""


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """A clock that goes on by its last number with each look."""
    step, now = [0.0], [0.0]

    def monotonic() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr(loading.time, "monotonic", monotonic)
    return step


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def load(counting: LoadingLog, methods: list[Method]) -> None:
    for method in methods:
        with counting.of(method):
            pass


@pytest.fixture
def counting(caplog) -> LoadingLog:
    caplog.set_level(logging.INFO)
    return LoadingLog(logging.getLogger("a.server"))


def expected(counting: LoadingLog, count: int) -> list[Method]:
    methods = [Method() for _ in range(count)]
    for method in methods:
        counting.expect(method)
    return methods


def test_a_quick_load_is_one_line(counting, seconds, caplog):
    seconds[0] = 0.01
    methods = expected(counting, 57)
    load(counting, methods)
    assert lines(caplog) == ["epfuse has the weights of 57 of 57 MoE layers, after 1.1 s"]


def test_a_long_load_is_a_line_every_ten_seconds(counting, seconds, caplog):
    seconds[0] = 2.0  # a layer takes two looks at the clock: 4 s
    methods = expected(counting, 7)
    load(counting, methods)
    assert [line.split("epfuse has the weights of ")[1] for line in lines(caplog)] == [
        "3 of 7 MoE layers, after 10.0 s",
        "6 of 7 MoE layers, after 22.0 s",
        "7 of 7 MoE layers, after 26.0 s",
    ]


def test_weights_that_come_again_are_counted_from_the_beginning(counting, seconds, caplog):
    methods = expected(counting, 3)
    load(counting, methods)
    load(counting, methods)
    assert lines(caplog) == ["epfuse has the weights of 3 of 3 MoE layers, after 0.0 s"] * 2


def test_a_layer_that_fails_and_a_model_that_is_gone_are_not_counted(counting, seconds, caplog):
    gone = expected(counting, 5)
    load(counting, gone)
    caplog.clear()
    del gone
    first, second = expected(counting, 2)
    with pytest.raises(ValueError, match="no"), counting.of(first):
        raise ValueError("no")
    load(counting, [second])
    assert lines(caplog) == []
    load(counting, [first])
    assert lines(caplog) == ["epfuse has the weights of 2 of 2 MoE layers, after 0.0 s"]
