from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from epfuse.demo.checks import judge
from epfuse.demo.record import (
    CheckVerdict,
    DemoCheck,
    DemoRecord,
    LayerRecord,
    LogitsRecord,
    RankRecord,
    TrueSizeRecord,
)

LAYER = LayerRecord("model.layers.3.mlp.experts", 8, [5, 3], [16, 16], 128, 1e-6, 1e-6, 1e-6, 0.01)
LOGITS = LogitsRecord(max_abs=1e-5, rms=1e-6, noise=1e-6, scale=2.0)
RANKS = [RankRecord(rank, "cpu", {}, 1e-6, 1e-5, [1, 2, 3], 64, 0.5) for rank in range(2)]
TRUE_SIZE = TrueSizeRecord("GPU", 16, 8, "bf16", 1e-3, 1.0, 1e-4)


def judged(**changes: Any) -> dict[CheckVerdict, list[DemoCheck]]:
    values = {
        "layers": [LAYER],
        "logits": LOGITS,
        "ranks": RANKS,
        "expected": [1, 2, 3],
        "dtype": "float32",
        "true_size": TRUE_SIZE,
    }
    found: dict[CheckVerdict, list[DemoCheck]] = {verdict: [] for verdict in CheckVerdict}
    for check in judge(**(values | changes)):
        found[check.verdict].append(check)
    return found


def test_a_good_run_passes() -> None:
    found = judged()
    assert len(found[CheckVerdict.PASSED]) == 7
    assert not found[CheckVerdict.FAILED]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layers": [replace(LAYER, error=1e-3)]}, "layer 3: ranks' sum = transformers' experts"),
        ({"layers": [replace(LAYER, error=math.nan)]}, "layer 3: ranks' sum = transformers' experts"),
        ({"layers": [replace(LAYER, unsharded_distance=1e-3)]}, "layer 3: ranks' sum = epfuse on one rank"),
        ({"layers": [replace(LAYER, useful_rows=[5, 2])]}, "layer 3: each route runs on one rank"),
        ({"logits": replace(LOGITS, rms=1e-5)}, "logits = the untouched model's"),
        ({"expected": [1, 2, 4]}, "greedy tokens = the untouched model's"),
        ({"ranks": [RANKS[0], replace(RANKS[1], tokens=[1, 2, 4])]}, "every rank generates the same tokens"),
        ({"true_size": replace(TRUE_SIZE, error=0.1)}, "one layer at true size = float64"),
    ],
)
def test_each_check_fails_alone(changes: dict[str, Any], name: str) -> None:
    assert [check.name for check in judged(**changes)[CheckVerdict.FAILED]] == [name]


def test_a_number_that_json_lacks_becomes_null() -> None:
    layer = replace(LAYER, error=math.nan)
    record = DemoRecord({}, {}, {}, 16, [layer], LOGITS, RANKS, None, [], {})
    assert record.as_json()["layers"][0]["error"] is None
    assert record.as_json()["layers"][0]["useful_rows"] == [5, 3]


def test_bfloat16_tokens_are_not_required_to_agree() -> None:
    found = judged(expected=[1, 2, 4], dtype="bfloat16")
    assert not found[CheckVerdict.FAILED]
    assert [check.measured for check in found[CheckVerdict.INFORMATIVE]] == [1]
