"""`epfuse doctor` on a machine without a GPU, with a wrong vLLM and a cache that can't be written, all at once."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.doctor import block, show
from epfuse.cli.main import main
from epfuse.doctor.finding import Diagnosis, Finding, Verdict
from epfuse.report.terminal import Console
from tests.conftest import GPU
from tests.integrations.vllm.fake import write_package

TOKEN = "hf_" + "AbCdEfGh" * 4


def findings(verdict: Verdict) -> tuple[Finding, ...]:
    return (
        Finding(name="torch", verdict=Verdict.GOOD, found="2.13.0"),
        Finding(name="Kernel cache", verdict=verdict, found="a long text " * 20, fix="a long fix " * 12),
    )


@pytest.mark.skipif(GPU, reason="says what is missing on a machine without a GPU")
def test_three_broken_set_ups_in_one_run(tmp_path: Path) -> None:
    home, packages = tmp_path / "homes" / "carla", tmp_path / "packages"
    home.mkdir(parents=True)
    (home / "file").touch()
    write_package(packages / "vllm", "0.33.0", {})
    (packages / "vllm/model_executor/layers/fused_moe/modular_kernel.py").unlink()
    metadata = packages / "vllm-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_TOKEN": TOKEN,
        "TRITON_CACHE_DIR": str(home / "file" / "kernels"),
        "EPFUSE_POLICY": "auto",
        "PYTHONPATH": os.pathsep.join([str(packages), *sys.path]),
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", "epfuse", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert not done.stderr.strip()
    found = Diagnosis.model_validate({k: v for k, v in json.loads(done.stdout).items() if k != "ok"})
    lines = {finding.name: finding for finding in found.findings}
    assert not found.ok
    assert lines["Environment"].found == "EPFUSE_POLICY=auto"
    assert lines["vLLM"].verdict is Verdict.BAD
    assert lines["vLLM"].found.startswith("vLLM 9.9.9: the plugin stands down: ")
    assert "modular_kernel.py) is missing" in lines["vLLM"].found
    assert lines["Kernel cache"].found.startswith("~/file/kernels can't be written (Not a directory)")
    assert lines["Kernel cache"].fix is not None
    assert lines["Call"].verdict is Verdict.GOOD
    if lines["Driver"].verdict is Verdict.WARNING:  # else there is a GPU that torch was not built for
        assert lines["GPU"].found == "none; calls run on the CPU"
    for private in (TOKEN, str(home), str(tmp_path / "homes")):
        assert private not in block(found)
        assert private not in done.stdout
    host = re.compile(rf"(?<!\w){re.escape(socket.gethostname())}(?!\w)")
    assert not [finding for finding in found.findings if host.search(f"{finding.found} {finding.fix}")]


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.WARNING, 0), (Verdict.BAD, 1)])
def test_the_exit_code_says_whether_anything_is_bad(
    monkeypatch: pytest.MonkeyPatch, verdict: Verdict, code: int
) -> None:
    monkeypatch.setattr("epfuse.doctor.examine.examine", lambda checks: iter(findings(verdict)))
    for option in ((), ("--json",), ("--report",)):
        result = CliRunner().invoke(main, ["doctor", *option])
        assert result.exit_code == code, result.output
        assert verdict.value in result.stdout


def test_a_report_is_plain_and_narrow() -> None:
    text = block(Diagnosis(epfuse="1.2", findings=findings(Verdict.BAD)))
    assert text.startswith("epfuse doctor 1.2\ngood ")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert " ".join(text.split()).count("a long text") == 20  # nothing is cut
    assert "-> a long fix" in text


def test_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    show(Diagnosis(epfuse="1.2", findings=findings(Verdict.BAD)), Console(force_terminal=True))
    out = capsys.readouterr().out
    assert "\x1b[3" not in out  # no colour; bold may stay
    assert "bad" in out


def test_two_forms_at_once_are_refused() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", "--report"])
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_a_wrong_variable_does_not_keep_the_doctor_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from epfuse.environment import environment

    monkeypatch.setenv("EPFUSE_POLICY", "fastest")
    environment.cache_clear()
    monkeypatch.setattr("epfuse.doctor.examine.examine", lambda checks: iter(findings(Verdict.WARNING)))
    try:
        assert CliRunner().invoke(main, ["doctor"]).exit_code == 0
    finally:
        environment.cache_clear()
