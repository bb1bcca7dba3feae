from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epfuse.bench import machine

CPU = torch.device("cpu")


def test_clocks_as_nvidia_smi_gives_them() -> None:
    assert machine.parse_clocks("580.1, 1980, 2619, 1980, 2619, 700.00, 54\n") == {
        "driver": "580.1",
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "max_sm_mhz": 1980.0,
        "max_memory_mhz": 2619.0,
        "power_limit_w": 700.0,
        "temperature_c": 54.0,
    }


@pytest.mark.parametrize("answer", ["", "No devices were found", "1, 2"])
def test_an_answer_that_is_none(answer: str) -> None:
    assert machine.parse_clocks(answer) is None


def test_a_clock_that_is_not_told() -> None:
    found = machine.parse_clocks("580.1, [N/A], 2619, 1980, 2619, [Not Supported], 54")
    assert found is not None
    assert found["sm_mhz"] is None
    assert found["power_limit_w"] is None
    assert found["temperature_c"] == 54.0


def test_a_cpu_has_no_clocks() -> None:
    assert machine.read_clocks(CPU) is None


def test_device() -> None:
    found = machine.describe_device(CPU)
    assert found["target"] == "cpu"
    assert found["name"]
    assert found["cache_bytes"] >= 0


def test_versions_name_the_peers() -> None:
    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert {"transformers", "vllm", "sgl-deep-gemm", "flashinfer-python"} <= set(found)


def test_commit_of_a_checkout_and_of_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"rev-parse --show-toplevel": str(tmp_path), "rev-parse HEAD": "0123abc", "status --porcelain": " M a"}
    monkeypatch.setattr(machine, "_run", lambda command: answers[" ".join(command[3:])])
    monkeypatch.setattr(machine.epfuse, "__file__", str(tmp_path / "src" / "epfuse" / "__init__.py"))
    assert machine.commit() == {"hash": "0123abc", "changed": True}
    monkeypatch.setattr(machine.epfuse, "__file__", str(tmp_path / "site-packages" / "epfuse" / "__init__.py"))
    assert machine.commit() is None


def test_a_command_that_is_missing_or_fails() -> None:
    assert machine._run(["a-command-that-nobody-has"]) is None
    assert machine._run(["false"]) is None
    assert machine._run(["echo", "yes"]) == "yes"
