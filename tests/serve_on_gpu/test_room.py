"""Whether two servers fit on a GPU is said before one starts, from the model's sizes, the caches' and the card's."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from tools.serve_on_gpu import __main__ as tool
from tools.serve_on_gpu import room
from tools.serve_on_gpu.arms import Workplace

from epfuse.errors import ConfigError

H200 = 143771 * 2**20
SEEN = {"minimax-m3": 22.68, "qwen3-30b-bf16": 55.78, "qwen3-30b-mxfp8": 29.63}
"""GiB that vLLM 0.25.1 said loading them took, on an H200."""


def place(model: str, *arguments: str) -> Workplace:
    return Workplace(Path("nowhere"), model, arguments)


@pytest.mark.parametrize("model", SEEN)
def test_weights_are_what_vllm_says_that_they_take(model: str) -> None:
    assert room.weight_bytes(place(model)) / room.GIB == pytest.approx(SEEN[model], rel=0.01)


def test_ranks_divide_experts_and_only_tensor_parallelism_divides_the_rest(tmp_path: Path) -> None:
    whole = room.weight_bytes(place("minimax-m3"))
    halves = room.weight_bytes(place("minimax-m3", "--tensor-parallel-size", "4", "--tensor-parallel-size=2"))
    assert halves == pytest.approx(whole / 2, abs=1)
    experts = 3 * 128 * 3 * 6144 * 3072 * 33 / 32
    data = room.weight_bytes(place("minimax-m3", "-dp", "2", "--enable-expert-parallel"))
    assert data == pytest.approx(whole - experts / 2, abs=1)
    for stages in (("-pp", "2"), ("--pipeline_parallel_size=2",)):
        assert room.weight_bytes(place("minimax-m3", *stages)) == pytest.approx(whole / 2, abs=1)


def test_a_checkpoints_weights_are_its_files(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(bytes(600))
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(590))  # the same, as vLLM reads one of both
    (tmp_path / "other.bin").write_bytes(bytes(900))
    assert room.weight_bytes(place(str(tmp_path), "-tp", "2")) == 300
    (tmp_path / "config.json").write_text("{}")
    assert room.weight_bytes(place(str(tmp_path), "--quantization", "fp8")) == 300
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert room.weight_bytes(place(str(tmp_path), "-q", "fp8")) == 600


def test_weights_in_the_hosts_memory_take_none_of_a_gpu() -> None:
    whole = room.weight_bytes(place("minimax-m3"))
    assert room.weight_bytes(place("minimax-m3", "--cpu-offload-gb", "2.5")) == whole - int(2.5 * room.GIB)
    assert room.weight_bytes(place("minimax-m3", "--cpu-offload-gb", "900")) == 0
    assert room.weight_bytes(place("minimax-m3", "--cpu-offload-gb", "some")) == whole


@pytest.mark.parametrize(
    ("text", "size"), [("12G", 12 * 2**30), ("9728M", 9728 * 2**20), ("9.5g", 9.5e9), ("20g", 20e9), ("7", 7)]
)
def test_sizes_are_read_as_vllm_reads_them(text: str, size: float) -> None:
    assert room.cache_bytes(text) == size


@pytest.mark.parametrize("text", ["9.5G", "G", "", "0G", "12GB", "-1G", "12 G"])
def test_sizes_that_vllm_would_refuse(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--cache is .*12G"):
        room.cache_bytes(text)


@pytest.mark.parametrize(
    ("model", "cache", "card", "refused"),
    [
        ("qwen3-30b-bf16", "20G", H200, "156.5 GiB of a GPU that has 140.4: twice 55.8 of weights, 20.0 of"),
        ("qwen3-30b-bf16", "12G", H200, "--cache 11G fits"),
        ("qwen3-30b-bf16", "11G", H200, ""),
        ("qwen3-30b-mxfp8", "20G", H200, ""),  # both lived on it
        ("gpt-oss-20b-bf16", "20G", H200, ""),
        ("gpt-oss-20b-mxfp8", "40G", H200, ""),
        ("qwen3-30b-bf16", "1G", 80 * 2**30, "no --cache fits"),
        ("qwen3-30b-bf16", "20G", None, ""),
    ],
)
@pytest.mark.parametrize("part", ["alternate", "trace"])
def test_a_pair_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, model: str, cache: str, card: int | None, refused: str
) -> None:
    class BegunError(Exception):
        """A part has begun."""

    def began(*_: object) -> None:
        raise BegunError

    monkeypatch.setattr(room, "gpu_bytes", lambda: card)
    monkeypatch.setattr("tools.serve_on_gpu.alternate.run", began)
    monkeypatch.setattr("tools.serve_on_gpu.trace.run", began)
    paths = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(tool.main, [part, *paths, "--model", model, "--cache", cache])
    if refused:
        assert done.exit_code == 2, done.output
        assert refused in done.output
    else:
        assert "BegunError" in done.output or isinstance(done.exception, BegunError), done.output


@pytest.mark.parametrize("part", ["serve", "offline", "endure"])
@pytest.mark.parametrize(
    ("model", "arguments", "card", "refused"),
    [
        ("minimax-m3-16", "", H200, "takes some 112.3 GiB of a GPU beside keys and values, and gets 98.3 of 140.4"),
        ("minimax-m3-16", "--tensor-parallel-size 2", H200, ""),
        ("minimax-m3-16", "--tensor_parallel_size 2", H200, ""),
        ("minimax-m3-16", "--gpu-memory-utilization 0.9", H200, ""),
        ("minimax-m3-16", "--gpu-memory-utilization most", H200, ""),  # vLLM's to judge
        ("minimax-m3-16", "--kv-cache-memory-bytes 1G", H200, ""),  # then it asks for no share
        ("minimax-m3-16", "--tensor-parallel-size two", H200, "112.3"),
        ("qwen3-30b-bf16", "", H200, ""),
        ("qwen3-30b-bf16", "", 80 * 2**30, "and gets 56.0 of 80.0 (--gpu-memory-utilization 0.7)"),
        ("minimax-m3-16", "", None, ""),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    model: str,
    arguments: str,
    card: int | None,
    refused: str,
) -> None:
    monkeypatch.setattr(room, "gpu_bytes", lambda: card)
    paths = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seconds", "1"]
    done = CliRunner().invoke(tool.main, [part, *paths, "--model", model, "--serve-arguments", arguments])
    assert done.exit_code == (2 if refused else 75), done.output  # 75: there is no time to begin
    assert refused in done.output


@pytest.mark.parametrize(
    ("visible", "size"),
    [("", 80), ("0", 141), ("1", 80), ("0,1", 80), ("GPU-7f", 141), ("GPU-", 80), ("GPU-9", 80), (None, 80)],
)
def test_the_smallest_gpu_that_servers_may_use_counts(monkeypatch, visible: str | None, size: int) -> None:
    monkeypatch.setattr(room, "answer", lambda *_: f"0, GPU-7fe1, {141 * 1024}\n1, GPU-6e, {80 * 1024}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert room.gpu_bytes() == size * 2**30


def test_without_a_gpu_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "answer", lambda *_: "([Errno 2] No such file or directory: 'nvidia-smi')")
    assert room.gpu_bytes() is None
