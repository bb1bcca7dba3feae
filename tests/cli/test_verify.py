"""``epfuse verify``: what it prints and how it exits."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.verify import suite

SMALL = ["verify", "--device", "cpu", "--hidden", "24", "--intermediate", "16", "--experts", "6", "--ep-size", "3"]
SMALL += ["--top-k", "2", "--tokens", "5"]


def test_json_record() -> None:
    result = CliRunner().invoke(main, [*SMALL, "--json", "--dtype", "float32", "--seed", "3"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["ok"] is True
    assert record["device"]["target"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert record["problem"]["ep_size"] == 3
    uniform = next(case for case in record["cases"] if case["name"] == "uniform" and case["path"] == "reference")
    assert set(uniform) == {
        *("name", "path", "weights", "combine", "tokens", "ok"),
        *("snr_db", "max_error", "relative_error", "tolerance", "failures"),
    }
    assert uniform["tokens"] == 5
    assert uniform["snr_db"] >= uniform["tolerance"]["snr_db"] > 100
    assert uniform["max_error"] <= uniform["tolerance"]["max_error"]


def test_table() -> None:
    result = CliRunner().invoke(main, [*SMALL, "--path", "auto"])
    assert result.exit_code == 0, result.output
    assert "20 of 20 cases passed" in result.stdout
    assert "outlier channel" in result.stdout


def test_a_failed_check_exits_1_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suite.fused_experts

    def forgets_the_last_route(hidden, weights, topk_weights, topk_ids, *args, **kwargs):
        return right(
            hidden, weights, topk_weights, topk_ids.clone().index_fill_(1, torch.tensor([1]), -1), *args, **kwargs
        )

    monkeypatch.setattr(suite, "fused_experts", forgets_the_last_route)
    result = CliRunner().invoke(main, SMALL)
    assert result.exit_code == 1
    assert "FAIL reference dense, uniform, T=5: sum over ranks" in result.stdout


def test_too_little_memory_exits_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_, **named):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(suite, "run", runs_out)
    result = CliRunner().invoke(main, SMALL)
    assert result.exit_code == 2
    assert "epfuse: cpu is out of memory; it needs fewer --tokens" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--path", "w8a8"], "path 'w8a8' has MXFP8 weights, whose sizes must be multiples of 32"),
        (["--experts", "7"], "epfuse: ep_size is 3; it must divide experts=7"),
        (["--top-k", "9"], "top_k is 9, more than experts=6"),
        (["--hidden", "0"], "0 is not in the range 1<=x<=1048576"),
        (["--tokens", "0"], "'0' is not a token count"),
        (["--device", "tpu0"], "epfuse: device is 'tpu0'; it must be cpu, cuda or cuda:N"),
        (["--device", "meta"], "epfuse: device is 'meta'; it must be cpu, cuda or cuda:N"),
        (["--device", "cuda:97"], "epfuse: device is 'cuda:97'; torch"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--tokens", "many"], "'many' is not a token count"),
    ],
)
def test_wrong_usage_exits_2(options: list[str], words: str) -> None:
    result = CliRunner().invoke(main, [*SMALL, *options])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""
