"""``epfuse plan``: its record, its tables, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main
from tests.weights.test_model_config import GPT_OSS, MIXTRAL


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


def test_a_gpu_without_a_machine_has_no_times() -> None:
    result = plan(*M3, "--device", "mi355x")
    assert result.exit_code == 0, result.output
    assert "No times" in result.stdout


@pytest.mark.parametrize("config", [GPT_OSS, MIXTRAL])
def test_a_config_file(tmp_path: Path, config: dict[str, object]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ("--config", str(path), "--ep-size", "4", "--device", "h200", "--max-model-len", "8192", "--json")
    record = json.loads(plan(*arguments).stdout)
    quantised = "quantization_config" in config
    assert {entry["storage"] for entry in record["layers"]} == {"mxfp8" if quantised else "bf16"}
    assert record["shape"]["local_experts"] * 4 == config["num_local_experts"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*M3,), "needs --target or --device"),
        ((*M3, "--device", "h100", "--target", "gfx942"), "'h100', which is sm_90"),
        ((*M3, "--target", "gfx942", "--hbm", "lots"), "'lots' is no size"),
        ((*M3, "--target", "gfx942", "--hbm", "40GiB"), "53.3 GB a rank as mxfp8"),
        ((*M3[:3], "7", *M3[4:], "--target", "gfx942"), "must divide the model's 128 experts"),
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
