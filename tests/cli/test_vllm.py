"""`epfuse vllm`: what is printed, and the exit codes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from tests.integrations.vllm.patch.sites import make_site


def run(*args: str):
    return CliRunner().invoke(main, ["vllm", *args])


def groups(*args: str) -> list[dict]:
    result = run("explain", "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["groups"]


def test_explain_minimax_m3_on_mi300x():
    (group,) = groups("--policy", "auto")
    assert group["layers"] == list(range(3, 60))
    assert group["without_epfuse"]["experts"] == "Mxfp8EmulationTritonExperts"
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    assert group["with_epfuse"]["weights"] == "mxfp8"
    assert group["with_epfuse"]["paths"] == [{"min_tokens": 1, "max_tokens": None, "path": "w8a16"}]


def test_explain_minimax_m3_on_h100():
    (group,) = groups("--policy", "auto", "--target", "sm_90", "--vllm-version", "0.25.1")
    assert group["without_epfuse"]["experts"] == "MarlinExperts"
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    assert group["with_epfuse"]["reason"].endswith("0.40 to 0.94 on an H200 (docs/performance.md).")


@pytest.mark.parametrize("build", ["0.25.1.post1", "0.25.1+rocm711", "0.25.1.post2+cu130.g1234"])
def test_explain_takes_a_build_of_a_release_as_the_plugin_does(build):
    line = ("--policy", "auto", "--target", "sm_90", "--vllm-version")
    assert groups(*line, build) == groups(*line, "0.25.1")


def test_explain_names_the_gpu_that_it_speaks_of():
    line = ("explain", "--target", "sm_90", "--vllm-version", "0.25.1")
    assert "NVIDIA H100 80GB HBM3 (sm_90)" in run(*line).stdout
    assert "NVIDIA H200 (sm_90)" in run(*line, "--device", "NVIDIA H200").stdout


def test_explain_without_expert_parallelism_on_hopper():
    (group,) = groups("--policy", "auto", "--target", "sm_90", "--no-ep")
    assert group["without_epfuse"]["experts"] == "HummingIndexedExperts"
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    assert "HummingIndexedExperts' time on an H100 (five layers)" in group["with_epfuse"]["reason"]


def test_explain_the_seed_at_short_context():
    (group,) = groups("--policy", "seed-1782", "--max-model-len", "2304")
    assert [part["path"] for part in group["with_epfuse"]["paths"]] == ["bf16", "w8a8", "bf16"]


def test_explain_groups_layers_that_differ():
    found = groups("--policy", "seed-1782", "--tp", "1")
    assert len(found) > 2
    assert [layer for group in found for layer in group["layers"]] == list(range(3, 60))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--policy", "seed-1782", "--target", "sm_90"), "The target is sm_90"),
        (("--policy", "seed-1782", "--tp", "4"), "The EP size is 4"),
        (("--policy", "auto", "--moe-backend", "marlin"), "--moe-backend marlin was asked for"),
        (("--policy", "auto", "--target", "gfx950"), "No measurement or prediction says"),
    ],
)
def test_explain_says_why_not(args, reason):
    (group,) = groups(*args)
    assert group["with_epfuse"]["experts"] == group["without_epfuse"]["experts"]
    assert group["with_epfuse"]["reason"].startswith(reason)


def test_explain_with_a_backend_promises_no_class():
    """vLLM reads its name in any case and with dashes."""
    for said, read in (("deep-gemm", "deep_gemm"), ("MARLIN", "marlin")):
        (group,) = groups("--moe-backend", said)
        assert group["without_epfuse"]["experts"] == f"those of --moe-backend {read}"
    assert groups("--moe-backend", "AUTO") == groups()


def test_explain_as_a_table():
    result = run("explain", "--policy", "auto", "--no-ep")
    assert result.exit_code == 0
    assert "3..59" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("--max-model-len", "2147483648"),
        ("--vllm-version", "0.1.0"),
        ("--vllm-version", "0.25.1rc1"),
        ("--tp", "129"),
        ("--tp", "5", "--no-ep"),
    ],
)
def test_explain_refuses_what_it_does_not_know(args):
    assert run("explain", *args).exit_code == 2


def test_patch(tmp_path):
    make_site(tmp_path)
    site = ("--site", str(tmp_path))
    assert run("patch", "verify", *site).exit_code == 1
    assert run("patch", "apply", *site).output.strip().endswith("applied (changed)")
    assert run("patch", "verify", *site).exit_code == 0
    assert json.loads(run("patch", "status", "--json", *site).stdout)["state"] == "applied"
    assert run("patch", "revert", *site).output.strip().endswith("clean (changed)")


def test_patch_refuses_a_directory_without_vllm(tmp_path):
    result = run("patch", "apply", "--site", str(tmp_path))
    assert result.exit_code == 2
    assert "no vLLM is installed" in result.output


def config(tmp_path, **content) -> str:
    (tmp_path / "config.json").write_text(json.dumps(content))
    return str(tmp_path)


def test_explain_knows_where_the_plugin_takes_gpt_oss(tmp_path):
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4}
    model = config(tmp_path, model_type="gpt_oss", num_hidden_layers=36, **sizes)
    (group,) = groups("--model", model)
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    (group,) = groups("--model", model, "--target", "sm_90")
    assert group["with_epfuse"]["experts"] == "TritonExperts"
    assert "H=2880 and I=2880 are no multiples of 128: no measurement" in group["with_epfuse"]["reason"]
    (group,) = groups("--model", model, "--target", "sm_90", "--device", "NVIDIA H200")
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    assert "0.69 to 0.99 of TritonExperts' time on an H200" in group["with_epfuse"]["reason"]


def test_explain_spreads_experts_that_do_not_divide(tmp_path):
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4}
    model = config(tmp_path, model_type="qwen2_moe", hidden_act="silu", num_hidden_layers=24, **sizes)
    (group,) = groups("--model", model)
    assert group["with_epfuse"]["experts"] == "EpfuseExperts"
    # the first four of eight ranks hold 8 experts, the others 7
    assert group["with_epfuse"]["bytes_per_layer_and_rank"] == 8 * 3 * 2048 * 1408 * 2


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "of the weight formats that epfuse replaces.",
        ),
        ({"quant_method": "mxfp4"}, "no measurement says that it would be faster."),
    ],
)
@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90"])
def test_explain_leaves_formats_that_the_plugin_does_not_replace(target, quantization, words, tmp_path):
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 4}
    content = {"hidden_act": "silu", "num_hidden_layers": 4, "quantization_config": quantization} | sizes
    (group,) = groups("--model", config(tmp_path, model_type="qwen3_moe", **content), "--target", target)
    assert group["with_epfuse"]["experts"] == group["without_epfuse"]["experts"]
    assert group["with_epfuse"]["reason"].endswith(words)


@pytest.mark.parametrize(
    "args", [("explain",), ("explain", "--json"), ("patch", "status"), ("patch", "verify", "--json")]
)
def test_a_result_that_can_not_be_printed_is_told(args, tmp_path, monkeypatch):
    make_site(tmp_path)
    site = ("--site", str(tmp_path)) if args[0] == "patch" else ()

    def full(*_, **named):
        if not named.get("err"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("click.echo", full)
    monkeypatch.setattr("rich.console.Console.print", full)
    assert run(*args, *site).exit_code == 2
