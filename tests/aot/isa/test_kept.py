"""Results on disk: a run that was ended goes on where it was, and nothing else is taken for its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from epfuse.aot.isa.cases import Found, run_case
from epfuse.aot.isa.inject import Fault, Injected
from epfuse.aot.isa.kept import Kept, run_of
from epfuse.aot.isa.work import GemmWork
from epfuse.errors import ConfigError


@dataclass
class Counted:
    """A case that counts how often it is executed."""

    name: str = "counted"
    times: int = 0

    def execute(self, found: Found, seed: int) -> None:
        self.times += 1
        found.failures.append("one element differs")
        found.hashes["00ff"] = "down_kernel"
        found.work.append(GemmWork("down_kernel", 4, {"matrix": 2}, 1, 128, 1, 3, 0))


def test_a_case_is_executed_once(tmp_path: Path) -> None:
    case, kept = Counted(), Kept(tmp_path, "run")
    first = run_case(case, 0, kept)
    assert run_case(case, 0, kept) == first
    assert case.times == 1
    run_case(case, 0, Kept(tmp_path, "another run"))
    run_case(case, 0, Kept(None, "run"))
    assert case.times == 3


def test_faults_come_back_as_they_were(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "run")
    injected = Injected("down_kernel", [Fault("mask", 3, "v_cndmask_b32_e32 v7, v22, v7, vcc", "", True)], {"mask": 9})
    kept.save("down", Injected, injected)
    assert kept.load("down", Injected) == injected
    assert kept.load("gate_up", Injected) is None


@pytest.mark.parametrize("text", ["", "{", '{"kernel": 3}', "[]"])
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    kept = Kept(tmp_path, "run")
    kept.save("down", Injected, Injected("down_kernel"))
    [file] = tmp_path.iterdir()
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"{file.name} is none .*remove it"):
        kept.load("down", Injected)


def test_another_seed_is_another_run() -> None:
    assert run_of(0) == run_of(0) != run_of(1)
