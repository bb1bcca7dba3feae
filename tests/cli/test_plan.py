"""``epfuse plan``: its record, its tables, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main
from epfuse.policy import auto, call, ranges
from tests.weights.test_model_config import GPT_OSS, MIXTRAL, QWEN_FP8


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


M3 = ("--config", "minimax-m3", "--ep-size", "8", "--max-model-len", "9472")


def test_json() -> None:
    result = plan(*M3, "--target", "gfx942", "--hbm", "192GiB", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["policy"] == "auto"
    assert record["bytes_per_rank"] == {
        "bf16": 103280541696,
        "mxfp8": 53254029312,
        "hybrid": 156534571008,
        "chosen": 53254029312,
    }
    assert {entry["path"] for entry in record["ranges"]} == {"w8a16"}


def test_tables() -> None:
    result = plan(*M3, "--target", "gfx942", "--policy", "seed-1782")
    assert result.exit_code == 0, result.output
    for words in ("103.3", "53.3", "156.5", "PREDICTED", "Long context at EP8", "4 ranks instead of 8", "29.24"):
        assert words in result.stdout


def test_no_line_of_the_log_stands_before_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    for cache in (call.call_table, ranges._ranges, auto._gains):
        cache.cache_clear()
    result = plan(*M3, "--device", "h200")
    assert result.exit_code == 0, result.output
    assert caplog.records == []


def test_a_gpu_without_a_machine_has_no_times() -> None:
    result = plan(*M3, "--device", "mi355x")
    assert result.exit_code == 0, result.output
    assert "No times" in result.stdout


@pytest.mark.parametrize(("config", "storage"), [(GPT_OSS, "mxfp8"), (MIXTRAL, "bf16"), (QWEN_FP8, "block_fp8")])
@pytest.mark.parametrize("named", [".", "config.json"])
def test_a_config_file_or_its_folder(tmp_path: Path, config: dict[str, object], storage: str, named: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = (
        "--config",
        str(tmp_path / named),
        "--ep-size",
        "4",
        "--device",
        "h200",
        "--max-model-len",
        "8192",
        "--json",
    )
    record = json.loads(plan(*arguments).stdout)
    assert {entry["storage"] for entry in record["layers"]} == {storage}
    assert record["shape"]["local_experts"] * 4 == record["shape"]["experts"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*M3,), "needs --target or --device"),
        ((*M3, "--device", "h100", "--target", "gfx942"), "'h100', which is sm_90"),
        ((*M3, "--target", "gfx942", "--hbm", "lots"), "'lots' is no size"),
        ((*M3, "--target", "gfx942", "--hbm", "40GiB"), "53.3 GB a rank as mxfp8"),
        ((*M3, "--target", "gfx942", "--hbm", "1" * 400), "is no size"),
        ((*M3, "--target", "gfx942", "--hbm", "0.1"), "is no size"),
        ((*M3, "--target", "gfx942", "--hbm", "\u0663GiB"), "is no size"),
        ((*M3[:5], "2147483648", "--target", "gfx942"), "2147483648"),
        ((*M3[:3], "200", *M3[4:], "--target", "gfx942"), "ep_size is 200; it must be in 1..128"),
        ((*M3[:3], "9" * 400, *M3[4:], "--target", "gfx942"), "--ep-size"),
        (("--config", "/dev/zero", *M3[2:], "--target", "gfx942"), "has more than"),
        (("--config", "/dev/null", *M3[2:], "--target", "gfx942"), "is not JSON"),
        (("--config", "/dev", *M3[2:], "--target", "gfx942"), "config.json can't be read"),
        (("--config", "nowhere.json", *M3[2:], "--target", "gfx942"), "nowhere.json can't be read"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_environments_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    from epfuse.environment import environment

    monkeypatch.setenv("EPFUSE_POLICY", "seed-1782")
    environment.cache_clear()
    try:
        assert json.loads(plan(*M3, "--target", "gfx942", "--json").stdout)["policy"] == "seed-1782"
    finally:
        environment.cache_clear()


def test_plan_says_what_the_layer_does_and_what_the_plugin_does(tmp_path: Path) -> None:
    """gpt-oss in BF16: the layer adds its biases, and so does the plugin."""
    bf16 = {key: value for key, value in GPT_OSS.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(bf16))
    asked = ("--config", str(tmp_path), *M3[2:], "--target", "gfx942")
    record = json.loads(plan(*asked, "--json").stdout)
    assert {entry["storage"] for entry in record["layers"]} == {"bf16"}
    assert {(entry["path"], entry["kernels"]) for entry in record["ranges"]} == {("bf16", "portable")}
    assert record["vllm"]["plugin"] == "epfuse's vLLM plugin takes these layers."
    assert record["vllm"]["plugin"] in " ".join(plan(*asked).stdout.split())
    arguments = ["vllm", "explain", "--model", str(tmp_path), "--target", "gfx942", "--json"]
    explained = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert {group["with_epfuse"]["experts"] for group in explained["groups"]} == {"EpfuseExperts"}


def test_explain_takes_vllms_own_exchange_between_data_parallel_ranks_and_no_other() -> None:
    def groups(*more: str) -> list[dict]:
        arguments = ["vllm", "explain", "--target", "sm_90", "--tp", "1", *more, "--json"]
        return [group["with_epfuse"] for group in json.loads(CliRunner().invoke(main, arguments).stdout)["groups"]]

    (gathered,), (spread,) = groups("--dp", "8"), groups("--tp", "8")
    assert gathered == spread  # 16 experts a rank, whoever has the tokens
    (other,) = groups("--dp", "8", "--all2all-backend", "deepep_high_throughput")
    assert other["reason"] == "tokens are exchanged by deepep_high_throughput, which epfuse does not serve yet."
    (split,) = groups("--dp", "8", "--no-ep", "--all2all-backend", "deepep_high_throughput")
    assert split["experts"] == "EpfuseExperts"
