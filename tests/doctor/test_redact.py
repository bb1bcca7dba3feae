"""What is nobody's business is in no output."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from epfuse.doctor import redact
from epfuse.doctor.checks import Check
from epfuse.doctor.examine import examine

TOKEN = "hf_" + "AbCdEfGh" * 4


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Everything private, in one text that a check tells."""
    home = tmp_path / "homes" / "carla"
    home.mkdir(parents=True)
    private = {
        "HOME": str(home),
        "HF_TOKEN": TOKEN,
        "MY_API_KEY": "no-known-form-of-a-token",
        "HOSTNAME": "node-17.cluster.example",
    }
    for name, value in private.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "login3")
    secrets = [*private.values(), "login3", "node-17", "ghp_0123456789abcdefghij", "name:word@"]
    text = (
        f"{home}/.triton and /home/other/x, /Users/third: on login3 (node-17.cluster.example) with {TOKEN},"
        " no-known-form-of-a-token, ghp_0123456789abcdefghij from https://name:word@index.example/simple"
    )
    monkeypatch.setenv("TOLD", text)
    return secrets


def test_a_text_without_what_is_private(told: list[str]) -> None:
    text = redact.Redaction.of_this_process().text(os.environ["TOLD"])
    assert not [secret for secret in told if secret in text]
    assert text == (
        "~/.triton and ~/x, ~: on <host> (<host>) with <secret>, <secret>, <secret> from"
        " https://<secret>index.example/simple"
    )


def test_a_finding_without_what_is_private(told: list[str]) -> None:
    (finding,) = examine([Check("tells", "tests.doctor.probes:tells_all")])
    assert not [secret for secret in told if secret in finding.model_dump_json()]
    assert finding.fix is not None
    assert finding.found.startswith("~/.triton")
    assert finding.fix.startswith("~/.triton")


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "h2")
    monkeypatch.setenv("HOSTNAME", "localhost")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a switch
    text = "NVIDIA H200 (h200); torch 2.13.0+cu130; false; localhost; /rooted/x"
    assert redact.Redaction.of_this_process().text(text) == text
