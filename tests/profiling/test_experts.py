"""The expert view's bytes and rates, the shapes that it is given, and the devices that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epfuse.config import MINIMAX_M3_EP8
from epfuse.errors import ConfigError
from epfuse.hardware.time_model import MI300X
from epfuse.profiling.events import TracedDevice
from epfuse.profiling.experts import ExpertStep, moved_bytes, view_experts
from epfuse.profiling.phases import Phase
from epfuse.profiling.sentences import describe_experts, describe_prediction
from epfuse.profiling.shapes import SHAPES, WEIGHT_BYTES, read_config

M3 = SHAPES["minimax-m3-ep8"]


def test_the_profiled_servers_experts_reach_what_was_published() -> None:
    """InferenceX, MI300X 1k/c256: 30.31 ms for both GEMMs of 57 layers, which is 3.4 TB/s of BF16 weights."""
    steps = [ExpertStep(216, 57, {Phase.GEMM1: 20_200_000, Phase.GEMM2: 10_110_000})]
    view = view_experts(steps, M3, "bf16", "a test", 5.3e12, MI300X)
    assert view is not None
    assert sum(gemm.bytes for gemm in view.gemms) / 1e9 == pytest.approx(103.3, rel=0.01)
    assert [round(gemm.rate / 1e12, 1) for gemm in view.gemms] == [3.4, 3.4]
    assert all(0.6 < (gemm.fraction or 0) < 0.7 for gemm in view.gemms)
    by_path = {prediction.path: prediction for prediction in view.predictions}
    assert 10e6 < by_path["w8a16"].saved < 17e6  # half the bytes: of 30 ms, about 14
    line = describe_prediction(view, by_path["w8a16"])
    assert line.startswith("predicted: if these experts were w8a16")
    assert line.endswith("ms of 30.31 ms")


def test_bytes_by_hand() -> None:
    hidden, intermediate = 6144, 3072
    assert moved_bytes(Phase.GEMM1, MINIMAX_M3_EP8, None, 2) == 16 * 2 * hidden * intermediate * 2
    assert moved_bytes(Phase.GEMM2, MINIMAX_M3_EP8, None, 2) == 16 * hidden * intermediate * 2
    one = 16 * 4 / 128  # experts and rows that one token brings to this rank
    assert moved_bytes(Phase.GEMM2, MINIMAX_M3_EP8, 1, 2) == pytest.approx(
        one * hidden * intermediate * 2 + one * (hidden + intermediate) * 2
    )
    assert WEIGHT_BYTES["mxfp8"] == 33 / 32


def test_without_tokens_or_a_known_device_nothing_is_predicted() -> None:
    times = {Phase.GEMM1: 1000, Phase.GEMM2: 1000}
    for tokens, machine in ((None, MI300X), (8, None)):
        view = view_experts([ExpertStep(tokens, 1, times)], M3, "bf16", "a test", None, machine)
        assert view is not None
        assert view.predictions == []
        assert [gemm.fraction for gemm in view.gemms] == [None, None]
    assert view_experts([ExpertStep(8, 1, {Phase.ACTIVATION: 5})], M3, "bf16", "a test", None, None) is None


def test_a_shape_that_does_not_fit_is_said_so() -> None:
    view = view_experts([ExpertStep(8, 57, {Phase.GEMM1: 1000})], M3, "bf16", "a test", 5.3e12, None)
    assert view is not None
    assert "more than the memory can do: is this the right shape?" in describe_experts(view)[1]


def config(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def test_configs_of_model_families(tmp_path: Path) -> None:
    shape = read_config(config(tmp_path, QWEN), ep_size=8)
    assert (shape.layer.hidden, shape.layer.intermediate, shape.layer.local_experts) == (4096, 1536, 16)
    assert (shape.name, shape.weights) == ("qwen3_moe", "bf16")
    assert read_config(config(tmp_path, QWEN), tp_size=4).layer.intermediate == 384
    text = {"hidden_size": 6144, "intermediate_size": 3072, "num_local_experts": 128, "num_experts_per_tok": 4}
    nested = {"text_config": text, "quantization_config": {"quant_method": "mxfp8"}, "hidden_size": 7}
    shape = read_config(config(tmp_path, nested), ep_size=8)
    assert (shape.layer, shape.weights) == (MINIMAX_M3_EP8, "mxfp8")
    block = QWEN | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert read_config(config(tmp_path, block)).weights == "block_fp8"
    nvfp4 = QWEN | {"quantization_config": {"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}}
    assert read_config(config(tmp_path, nvfp4)).weights is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "it must be an object"),
        ({"hidden_size": 64, "intermediate_size": 64}, "none of num_local_experts"),
        (QWEN | {"hidden_size": -1}, "hidden_size is -1; it must be an integer, at least 1"),
        (QWEN | {"hidden_size": "4096"}, "hidden_size is '4096'"),
        (QWEN | {"num_experts": 12}, "experts is 12; it must be a multiple of 8 ranks"),
        (QWEN | {"num_experts_per_tok": 256}, "top_k is 256, more than experts"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(config(tmp_path, content), ep_size=8)
    assert words in str(error.value)


def test_a_config_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("device", "product"),
    [
        (TracedDevice(0, "NVIDIA H100 80GB HBM3", 132, 32, (9, 0)), "H100 SXM"),
        (TracedDevice(0, "NVIDIA H100 PCIe", 114, 32, (9, 0)), "H100 PCIe"),
        (TracedDevice(0, "NVIDIA H200", 132, 32, (9, 0)), "H200"),
        (TracedDevice(0, "AMD Instinct MI300X"), "MI300X"),
        (TracedDevice(0, "", 304, 64, (9, 4), 206141652992), "MI300X"),
        (TracedDevice(0, "", 304, 64, (9, 4), 256 << 30), "MI325X"),
        (TracedDevice(0, "", 256, 64, (9, 5), 288 << 30), "MI355X"),
        (TracedDevice(0, "NVIDIA GeForce RTX 4090", 128, 32, (8, 9)), None),
        (TracedDevice(0), None),
    ],
)
def test_devices(device: TracedDevice, product: str | None) -> None:
    found = device.gpu
    assert (found.name if found else None) == product
