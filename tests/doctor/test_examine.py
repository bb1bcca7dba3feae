"""A check that crashes or hangs is a line, and costs no other line."""

from __future__ import annotations

import json
import time

import pytest

from epfuse.doctor.checks import CHECKS, Check
from epfuse.doctor.child import answer, one_line
from epfuse.doctor.examine import examine
from epfuse.doctor.finding import Diagnosis, Finding, Verdict


def probe(function: str, seconds: float = 30.0, needs: tuple[str, ...] = ()) -> Check:
    return Check(function, f"tests.doctor.probes:{function}", seconds, needs)


def test_whatever_goes_wrong_is_a_line_of_its_own() -> None:
    checks = (
        probe("hangs", 1.0),
        probe("raises", needs=("hangs",)),
        probe("fine"),
        probe("dies"),
        probe("ends"),
        Check("again", "tests.doctor.probes:fine", needs=("fine",)),
        Check("no module", "epfuse.doctor.none:none"),
    )
    start = time.monotonic()
    found = list(examine(checks))
    assert time.monotonic() - start < 30
    assert [finding.name for finding in found] == [check.name for check in checks]
    hung, skipped, fine, died, ended, again, missing = found
    assert (hung.verdict, hung.found) == (Verdict.BAD, "the check was ended after 1 s")
    assert (skipped.verdict, skipped.found) == (Verdict.WARNING, "not looked at: hangs is bad")
    assert fine.found == again.found == "fine"  # what is printed beside it is no part of it
    assert died.found == "the check ended its process by SIGSEGV"
    assert ended.found == "the check ended its process with exit code 3"
    assert "epfuse.doctor.none" in missing.found
    assert all(finding.fix for finding in found if finding.verdict is not Verdict.GOOD)


def test_what_needs_something_bad_is_not_begun() -> None:
    found = list(examine([probe("is_bad"), probe("hangs", needs=("is_bad",)), probe("fine")]))
    assert [finding.verdict for finding in found] == [Verdict.BAD, Verdict.WARNING, Verdict.GOOD]
    assert found[1].fix == "mend is_bad first"


def test_an_error_is_an_answer() -> None:
    verdict, found, fix = answer("tests.doctor.probes:raises")
    assert verdict is Verdict.BAD
    assert one_line(found) == "the check failed: RuntimeError: the driver says no"
    assert fix is not None
    assert "--report" in fix
    _, found, fix = answer("tests.doctor.probes:needs_a_package")
    assert (found, fix) == (
        "the package 'epfuse_has_no_such_package' is not installed",
        "pip install epfuse_has_no_such_package",
    )
    assert len(one_line("x" * 10_000)) == 900


def test_every_check_is_there_and_needs_earlier_ones() -> None:
    import importlib

    before: set[str] = set()
    for check in CHECKS:
        module, _, function = check.look.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert before.issuperset(check.needs)
        assert check.name not in before
        before.add(check.name)


@pytest.mark.parametrize(("verdict", "ok"), [(Verdict.WARNING, True), (Verdict.BAD, False)])
def test_a_diagnosis_as_json(verdict: Verdict, ok: bool) -> None:
    findings = (
        Finding(name="a", verdict=Verdict.GOOD, found="b"),
        Finding(name="c", verdict=verdict, found="d", fix="e"),
    )
    written = json.loads(Diagnosis(epfuse="1.2", findings=findings).model_dump_json())
    assert written == {
        "schema_version": 1,
        "epfuse": "1.2",
        "findings": [
            {"name": "a", "verdict": "good", "found": "b", "fix": None},
            {"name": "c", "verdict": verdict.value, "found": "d", "fix": "e"},
        ],
        "ok": ok,
    }
    schema = Diagnosis.model_json_schema(mode="serialization")
    assert set(schema["required"]) >= {"epfuse", "findings", "ok"}
    assert schema["$defs"]["Verdict"]["enum"] == ["good", "warning", "bad"]
