"""What the tests of one trace share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from epfuse.profiling.classify import Classifier
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from epfuse.profiling.rules import RuleSet
from tests.profiling.traces import TraceFile


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """The shipped rules."""
    return Classifier(RuleSet.load())


@pytest.fixture
def profile(classifier: Classifier, tmp_path: Path) -> Callable[..., Profile]:
    """Profile the only device of a trace; keywords as in `profile_trace`."""

    def run(trace: TraceFile, **options: object) -> Profile:
        (only,) = profile_trace(read_trace(trace.write(tmp_path / "trace.json")), classifier, **options)
        return only

    return run
