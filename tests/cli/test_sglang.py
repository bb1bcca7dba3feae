"""`epfuse sglang explain`: what is printed, and the exit codes; without SGLang."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main


def run(*args: str):
    return CliRunner().invoke(main, ["sglang", "explain", *args])


def said(*args: str, code: int = 0) -> dict:
    result = run("--json", "--policy", "auto", *args)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_minimax_m3_on_four_h200():
    found = said("--device", "NVIDIA H200")
    (group,) = found["groups"]
    assert group["layers"] == list(range(3, 60))
    assert group["without_epfuse"]["experts"] == "none"
    assert group["with_epfuse"]["experts"] == "EpfuseRunnerCore"
    assert group["with_epfuse"]["paths"] == [{"min_tokens": 1, "max_tokens": None, "path": "w8a16"}]
    assert found["expert_bytes_per_rank"] == 57 * group["with_epfuse"]["bytes_per_layer_and_rank"]
    assert round(found["expert_bytes_per_rank"] / 1e9, 1) == 106.5
    assert "BF16" in found["linear_layers"]


def test_the_bytes_are_those_of_plan():
    line = ("plan", "--config", "minimax-m3", "--ep-size", "4", "--device", "h200", "--max-model-len", "9472", "--json")
    plan = json.loads(CliRunner().invoke(main, line).stdout)
    assert said("--device", "NVIDIA H200")["expert_bytes_per_rank"] in numbers(plan)


def numbers(value) -> set:
    """All of them in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {value} if isinstance(value, int) else set().union(*map(numbers, inner))


def test_on_gfx942_block_fp8_is_replaced():
    found = said("--target", "gfx942", "--tp", "8", "--ep", "8")
    assert found["groups"][0]["without_epfuse"]["experts"] == "Fp8MoEMethod"
    assert "changes the weights" in found["groups"][0]["with_epfuse"]["reason"]
    assert found["linear_layers"] is None


def test_the_shared_expert_is_one_of_them_without_expert_parallelism():
    alone, spread = said("--ep", "1"), said("--ep", "4")
    assert alone["expert_bytes_per_rank"] * 128 == spread["expert_bytes_per_rank"] * 129


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--moe-runner-backend", "triton"), "--moe-runner-backend is triton (given)"),
        (("--moe-a2a-backend", "deepep"), "tokens are exchanged by deepep"),
    ],
)
def test_a_server_that_does_not_start_is_said(args, reason):
    found = said(*args, code=1)
    assert found["stops"].startswith("SGLang has no MXFP8 experts for Hopper")
    assert reason in found["stops"]
    assert found["expert_bytes_per_rank"] == 0


def test_what_stays_sglangs_is_no_failure():
    found = said("--target", "gfx942", "--moe-runner-backend", "triton")
    assert found["stops"] is None
    assert found["groups"][0]["with_epfuse"]["experts"] == "those of --moe-runner-backend triton"


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_a_checkpoint_that_sglang_reads_by_another_method_is_left(tmp_path, method):
    quantization = {"quant_method": method, "quant_algo": "MXFP8", "group_size": 32}
    if method == "compressed-tensors":
        weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                   "scale_dtype": "torch.uint8"}  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        quantization = {"quant_method": method, "format": "mxfp8-quantized", "config_groups": groups}
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "quantization_config": quantization,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = said("--model", str(tmp_path), "--target", "gfx942", "--tp", "2", "--ep", "2")
    assert found["groups"][0]["without_epfuse"]["experts"] == f"SGLang's choice for {method}"
    assert method in found["groups"][0]["with_epfuse"]["reason"]


def test_as_a_table():
    result = run("--device", "NVIDIA H200")
    assert result.exit_code == 0
    assert "NVIDIA H200 (sm_90), tp 4, ep 4" in result.stdout
    assert "3..59" in result.stdout
    assert "106.5 GB a rank" in result.stdout


@pytest.mark.parametrize(
    "args", [("--tp", "4", "--ep", "3"), ("--tp", "384", "--ep", "3"), ("--tp", "5", "--ep", "1"), ("--model", "none")]
)
def test_what_can_not_be_spread_is_wrong_usage(args):
    assert run(*args).exit_code == 2
