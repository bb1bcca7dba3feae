"""The core's environment variables: what they mean, and that a wrong value is never passed over."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterator

import pytest
import torch

from epfuse import Path, Target, environment, fused_experts
from epfuse.config import MINIMAX_M3_EP8, Policy
from epfuse.environment import Environment, LogLevel, Switch
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import LayerRequest, plan_layer
from tests.cases import make_case

KINDS = {"EPFUSE_POLICY": Policy, "EPFUSE_PATH": Path, "EPFUSE_LOG": LogLevel, "EPFUSE_NO_COMPILE": Switch,
         "EPFUSE_LAUNCH_PLANS": Switch}  # fmt: skip
SOURCE = pathlib.Path(environment.__file__).parent


@pytest.fixture(autouse=True)
def _read_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has an environment of its own, and leaves no handler behind."""
    log = logging.getLogger("epfuse")
    handlers, level = list(log.handlers), log.level
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment.environment.cache_clear()
    yield
    environment.environment.cache_clear()
    log.handlers[:] = handlers
    log.setLevel(level)


def test_nothing_set_means_the_defaults() -> None:
    assert environment.environment() == Environment(Policy.AUTO, Path.AUTO, None)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("value", ["", "AUTO", "fast"])
def test_an_unknown_value_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value!r}; it must be one of {next(iter(KINDS[name])).value}"):
        environment.environment()


def test_the_policy_of_plans_that_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    request = LayerRequest(Target.SM90, MINIMAX_M3_EP8, 8, 9472, 3, (3,))
    monkeypatch.setenv("EPFUSE_POLICY", "seed-1782")
    assert plan_layer(request).policy is Policy.SEED_1782
    assert plan_layer(request, Policy.AUTO).policy is Policy.AUTO


def test_the_path_that_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.device("cpu"))
    call = (case.hidden, case.weights, case.topk_weights, case.topk_ids, case.expert_map)
    monkeypatch.setenv("EPFUSE_PATH", "w8a16")
    with pytest.raises(UnsupportedTarget, match="'w8a16' has no kernel for cpu"):
        fused_experts(*call)
    fused_experts(*call, path=Path.REFERENCE)


def test_how_much_is_logged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EPFUSE_LOG", "info")
    environment.environment()
    logging.getLogger("epfuse.policy").info("a decision")
    logging.getLogger("epfuse.policy").debug("a detail")
    assert capsys.readouterr().err == "INFO epfuse.policy: a decision\n"


def test_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.environment() == Environment(kernels=None, no_compile=False)
    environment.environment.cache_clear()
    monkeypatch.setenv("EPFUSE_KERNELS", "kernels")
    monkeypatch.setenv("EPFUSE_NO_COMPILE", "1")
    assert environment.environment() == Environment(kernels="kernels", no_compile=True)


def test_one_file_reads_them_and_documents_them_all() -> None:
    assert environment.__doc__ is not None
    assert set(re.findall(r"^\| `(EPFUSE_\w+)` ", environment.__doc__, re.MULTILINE)) == set(environment.VARIABLES)
    for kind in KINDS.values():
        if kind is not Path:
            assert all(f"`{member.value}`" in environment.__doc__ for member in kind)
    readers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(f'"{name}"' in path.read_text() for name in environment.VARIABLES)
    }
    assert readers == {"environment.py"}
