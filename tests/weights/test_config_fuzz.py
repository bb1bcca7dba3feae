"""Configs with something wrong in them: our own error or a plan, in bounded time and memory, and nothing else."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from tests.weights.test_model_config import (
    GEMMA4,
    GPT_OSS,
    INKLING2,
    M3,
    M3_TEXT,
    MIXTRAL,
    MXFP8_GROUP,
    NEMOTRON_H,
    QWEN,
    QWEN_FP8,
    groups,
)

VALID = (
    M3,
    M3_TEXT,
    GPT_OSS,
    MIXTRAL,
    QWEN,
    QWEN_FP8,
    NEMOTRON_H,
    GEMMA4,
    INKLING2,
    M3_TEXT | {"quantization_config": groups(group_0=MXFP8_GROUP)},
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 0.0, 8.0, -0.0, 1e308, float("nan"),
    float("inf"), "", "8", "silu", "gelu", "mxfp8", "\ud800", "\x00", "re:(a+)+$", "*" * 200, [], {}, [0],
    [[]], [1] * 60, ["sparse"] * 60, [None], ["x"] * 1000, {"model_type": "mixtral"}, {"quant_method": "mxfp8"},
)  # fmt: skip
KEYS = (
    "quantization_config", "text_config", "moe_quant_algo", "quant_algo", "mlp_layer_types", "moe_layer_freq", "ignore",
    "moe_layers_enum", "num_experts", "expert_dtype", "dtype", "swiglu_limit", "config_groups", "targets", "model_type",
)  # fmt: skip
ALGORITHMS = ("quant_algo", "moe_quant_algo", "experts_quant_algo")
EXTREMES = (0, -1, 1, 2**31 - 1, 2**31, 2**63, 10**400, True, 8.0, "8", None)
CASES = 300
SECONDS = 5.0
MEGABYTES = 300


def objects(value: Any) -> Iterator[Any]:
    """Every object and list in a value, itself included."""
    if isinstance(value, dict | list):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from objects(entry)


def mutate(random_: random.Random, text: dict[str, Any]) -> str:
    """One to three changes in a valid config, and now and then one in its text."""
    config = copy.deepcopy(text)
    if random_.random() < 0.1:
        config["quantization_config"] = {"quant_method": "mxfp8", random_.choice(ALGORITHMS): "NVFP4"}
    for _ in range(random_.randint(1, 3)):
        place = random_.choice(list(objects(config)))
        if isinstance(place, list):
            if place and random_.random() < 0.5:
                place[random_.randrange(len(place))] = copy.deepcopy(random_.choice(VALUES))
            else:
                place.extend(copy.deepcopy(place) if random_.random() < 0.5 else [random_.choice(VALUES)])
            continue
        what = random_.random()
        keys = list(place)
        sizes = [key for key, value in place.items() if type(value) is int]
        if what < 0.3 and sizes:
            place[random_.choice(sizes)] = random_.choice(EXTREMES)
        elif what < 0.4 and keys:
            del place[random_.choice(keys)]
        elif what < 0.8 and keys:
            place[random_.choice(keys)] = copy.deepcopy(random_.choice(VALUES))
        else:
            place[random_.choice(KEYS)] = copy.deepcopy(random_.choice(VALUES))
    made = json.dumps(config)
    if random_.random() < 0.15:
        at = random_.randrange(len(made))
        made = made[:at] + random_.choice(["", "{", "[" * 2000, "NaN", '"', "\x00", "1" * 5000]) + made[at + 1 :]
    return made


@pytest.mark.parametrize("part", range(4))
def test_plan_survives_any_config(tmp_path: Path, part: int) -> None:
    random_ = random.Random(part)
    path = tmp_path / "config.json"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES // 4):
        text = mutate(random_, random_.choice(VALID))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        begin = time.monotonic()
        arguments = [
            "plan",
            "--config",
            str(path),
            "--device",
            random_.choice(["mi300x", "h200"]),
            "--max-model-len",
            "9472",
        ]
        result = CliRunner().invoke(main, [*arguments, "--hbm", "900000GB", "--json"])
        assert result.exception is None or isinstance(result.exception, SystemExit), (case, text, result.exception)
        assert result.exit_code in (0, 2), (case, text)
        assert time.monotonic() - begin < SECONDS, (case, text)
        if result.exit_code == 0:
            assert "NVFP4" not in text, "no field that says so may be passed over"
            json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
        else:
            assert result.stderr.startswith("epfuse: "), (case, text, result.stderr)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES << 10
