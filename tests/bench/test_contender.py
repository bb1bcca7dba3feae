from __future__ import annotations

import pytest
import torch

from epfuse import Path
from epfuse.bench.contender import Contender, ContenderKind, paths_of, problem_of
from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.measure import TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.target import Target
from epfuse.verify.suite import TRUE_SIZE_LIMITS

CPU = torch.device("cpu")


def contenders(layer: Layer, *choice: str) -> list[Contender]:
    return paths_of(problem_of(layer, (1, 8192), CPU, 0), choice, LayerWeights(layer, 0, CPU))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are made as on an H100; nothing is run."""
    monkeypatch.setattr("epfuse.verify.problem.target_of", lambda device: Target.SM90)


def names(found: list[Contender]) -> list[tuple[str, str]]:
    return [(contender.name, contender.weights) for contender in found]


def test_a_cpu_has_its_own_family_and_the_reference_where_it_is_asked_for() -> None:
    dense, packed = contenders(LAYERS["small"])
    assert names([dense, packed]) == [("bf16", "dense"), ("w8a16", "mxfp8")]
    assert (dense.kind, dense.method) == (ContenderKind.PATH, TimingMethod.PLAIN)
    (reference,) = contenders(LAYERS["small"], "reference")
    assert reference.operand is MatrixOperand.FP32
    assert reference.block_m(64) is None
    with pytest.raises(UnsupportedTarget):
        contenders(LAYERS["small"], "w8a8")


@pytest.mark.usefixtures("hopper")
def test_by_default_each_path_runs_once_on_its_best_weights() -> None:
    found = contenders(LAYERS["minimax-m3-ep8"])
    expected = [("bf16", "dense"), ("w8a16", "fragment"), ("w8a8", "row_fp8"), ("block_fp8", "block_fp8")]
    assert names(found) == expected
    assert [contender.operand.value for contender in found] == ["bf16", "bf16", "fp8", "fp8"]
    assert {contender.method for contender in found} == {TimingMethod.GRAPH}
    assert found[1].block_m(1) == 8
    assert found[1].block_m(8192) == 320
    assert found[1].tolerance.relative_error == TRUE_SIZE_LIMITS[Path.W8A16]


@pytest.mark.usefixtures("hopper")
def test_all_has_every_format_every_sum_and_the_reference() -> None:
    found = names(contenders(LAYERS["minimax-m3-ep8"], "all"))
    assert {("w8a16", "mxfp8"), ("w8a8 atomic", "mxfp8"), ("reference", "dense")} < set(found)
    assert len(set(found)) == len(found)


@pytest.mark.usefixtures("hopper")
def test_auto_and_names() -> None:
    assert ("w8a16", "fragment") in names(contenders(LAYERS["minimax-m3-ep8"], "auto"))
    assert names(contenders(LAYERS["minimax-m3-ep8"], "w8a16", "reference")) == [
        ("w8a16", "fragment"),
        ("reference", "dense"),
    ]


@pytest.mark.usefixtures("hopper")
def test_sizes_that_mxfp8_can_not_have() -> None:
    odd = Layer("", LayerShape(40, 24, 8, 4, 2), SwiGLUOAI())
    assert names(contenders(odd)) == [("bf16", "dense")]
    with pytest.raises(ConfigError, match="multiples of 32"):
        contenders(odd, "w8a16")
