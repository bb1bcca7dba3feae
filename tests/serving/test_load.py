"""The load: what the tools are asked for, and which results count."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from epfuse.serving.load import LoadFault, load_command, read_result
from epfuse.serving.point import Client

CLIENT = Client(prompts=2560, concurrency=256, warmups=512, isl=1024, osl=8192)


def test_vllms_range_is_inferencex(tmp_path):
    """0.8 there draws from [0.8 L, L]; vLLM from [L(1 - r), L(1 + r)]."""
    argv = load_command(CLIENT, "M3", "127.0.0.1", 8888, tmp_path / "result.json")
    assert argv[:3] == ("vllm", "bench", "serve")
    options = dict(pairwise(argv))
    assert (options["--random-input-len"], options["--random-output-len"]) == ("921", "7372")
    assert options["--random-range-ratio"] == "0.1111"
    assert (options["--num-prompts"], options["--max-concurrency"], options["--num-warmups"]) == ("2560", "256", "512")
    assert (options["--request-rate"], options["--seed"], options["--metric-percentiles"]) == ("inf", "0", "90,99,99.9")
    assert {"--ignore-eos", "--save-result", "--save-detailed"} <= set(argv)
    assert options["--result-filename"] == "result.json"


GOOD = {"completed": 2560, "duration": 9.5, "total_output_tokens": 100, "request_rate": "inf", "ttfts": [1.0]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD | {"completed": 2431}, "129 of 2560 requests failed"),
        (GOOD | {"completed": 0}, "2560 of 2560"),
        (GOOD | {"completed": float("nan")}, "does not say"),
        ({"duration": 1}, "does not say"),
        (GOOD | {"total_output_tokens": 0}, "nothing was measured"),
        ([], "no JSON object"),
    ],
)
def test_what_does_not_count(tmp_path, content, words):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    with pytest.raises(LoadFault, match=words):
        read_result(CLIENT, file)


@pytest.mark.parametrize("text", ["", '{"completed": 2560', "\0"])
def test_a_torn_result(tmp_path, text):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(LoadFault, match="result"):
        read_result(CLIENT, file)
    file.unlink()
    with pytest.raises(LoadFault, match="can't be read"):
        read_result(CLIENT, file)


def test_five_percent_may_fail(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(GOOD | {"completed": 2432}))
    assert read_result(CLIENT, file) == {"completed": 2432.0, "duration": 9.5, "total_output_tokens": 100.0}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99, 1.0])
def test_vllm_never_draws_a_token_more_than_the_longest(share):
    for longest in (2, 17, 100, 1000, 1024, 8192, 131_072):
        client = CLIENT.model_copy(update={"shortest_share": share})
        middle, ratio = client.vllm_lengths(longest)
        assert math.ceil(middle * (1 + ratio)) <= longest  # as vllm/benchmarks/datasets/utils.py has it
        assert math.ceil(middle * (1 + ratio)) >= longest * (1 - 2e-4) - 1
        assert abs(math.floor(middle * (1 - ratio)) - share * longest) <= 2 + 2e-4 * longest
