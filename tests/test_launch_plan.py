"""Calls of a kind that was seen before launch what they would launch without a plan, at the addresses of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.aot.tasks import start
from epfuse.launch_record import Record, recording
from tests import planned_calls
from tests.planned_calls import Drawn, Memory

pytest.importorskip("triton.experimental.gluon")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process that doesn't interpret."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as made:
        yield made


CALLS = st.sampled_from(sorted(planned_calls.LAYERS)).flatmap(
    lambda layer: st.lists(
        st.builds(
            Drawn,
            layer=st.just(layer),
            tokens=st.sampled_from((1, 3, 16, 17, 300)),
            ids=st.sampled_from(("int32", "int32", "int64")),
            memory=st.sampled_from(Memory),
            local=st.sampled_from((4, 4, 3)),
            numbers=st.sampled_from((7.0, 1.5)),
            fresh=st.booleans(),
            odd=st.sampled_from(("", "", "", "hidden", "weights")),
        ),
        min_size=2,
        max_size=8,
    )
)
"""Calls of one layer, so that some are of one kind: other T, dtypes, maps, memory, addresses, weights."""


@settings(deadline=None, max_examples=50)
@given(calls=CALLS)
def test_planned_calls_launch_what_others_launch(pool: ProcessPoolExecutor, calls: list[Drawn]) -> None:
    """Each three times over, so that it is seen, watched and planned."""
    assert pool.submit(planned_calls.differences, calls).result() == []


def test_calls_that_differ_in_one_thing_are_of_two_kinds_or_share_all_that_is_planned(
    pool: ProcessPoolExecutor,
) -> None:
    """Each such pair of calls in every layer, at few rows and at many."""
    assert pool.submit(planned_calls.pairs).result() == []


def test_an_operand_that_is_two_at_once_is_not_planned(pool: ProcessPoolExecutor) -> None:
    """Later calls of the kind may have a tensor of its own for each."""
    assert pool.submit(planned_calls.one_bias_for_both).result() == []


def test_every_family_that_can_is_planned(pool: ProcessPoolExecutor) -> None:
    """All but sums by atomics, where torch clears and rounds the sums."""
    planned = pool.submit(planned_calls.planned).result()
    assert planned == {name: "atomic" not in name for name in planned_calls.LAYERS}


def test_launch_hooks_and_streams_reach_planned_calls(pool: ProcessPoolExecutor) -> None:
    entered, left, streams = pool.submit(planned_calls.hooks_and_streams).result()
    assert entered == left == ["route_kernel", "gather_kernel", "gate_up_down_sm90_kernel", "combine_kernel"]
    assert streams == {5}


def test_steps_of_planned_calls_are_ranges(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(planned_calls.ranges).result() == [["route", "gather", "gate_up_down", "combine"]] * 4


def test_plans_are_few_and_hold_no_tensor(pool: ProcessPoolExecutor) -> None:
    kinds, alive = pool.submit(planned_calls.kept).result()
    assert kinds == 3
    assert alive == []


def test_threads_launch_at_their_own_addresses(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(planned_calls.in_threads).result() == []


def test_a_planned_call_takes_less_than_half_the_python(pool: ProcessPoolExecutor) -> None:
    """Functions entered; c8dab68 entered 246 with few rows, 352 with packed rows and 421 with FP8 rows."""
    entered = pool.submit(planned_calls.python_calls).result()
    assert entered["sm90"] <= 246 // 2
    assert entered["sm90_packed"] <= 352 // 2
    assert entered["sm90_fp8"] <= 421 // 2


def test_what_torch_computes_in_a_step_can_not_be_planned() -> None:
    memory = torch.empty(8)
    for run, whole in (
        (lambda: memory.view(2, 4)[1:].view(torch.uint8), True),
        (lambda: memory.new_empty(3), True),
        (lambda: memory.zero_(), False),
        (lambda: memory + 1, False),
    ):
        record = Record()
        with recording(record):
            run()
        assert record.is_whole is whole


def test_what_torch_computes_is_not_missed_where_python_sees_no_operators() -> None:
    """A plan without what they do would be a wrong one."""
    record = Record()
    with torch._C._DisableTorchDispatch(), recording(record):
        torch.empty(8).zero_()
    assert not record.is_whole


def test_plans_are_on_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from epfuse import launch_plan
    from epfuse.environment import environment
    from epfuse.target import Target

    call = SimpleNamespace(hidden=SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(launch_plan, "target_of", lambda device: Target.SM90)
    for value, wanted in (("0", False), ("1", True), (None, True)):
        if value is None:
            monkeypatch.delenv("EPFUSE_LAUNCH_PLANS")
        else:
            monkeypatch.setenv("EPFUSE_LAUNCH_PLANS", value)
        environment.cache_clear()
        assert launch_plan.can_plan(call) is wanted  # type: ignore[arg-type]
    environment.cache_clear()
