"""Data parallel ranks that share the experts: vLLM's gather and reduce-scatter around ours, over gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.config

from epfuse.integrations.vllm import layer, versions
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.parallel.launch import Placement, launch_ranks
from epfuse.policy.facts import GATHERED
from epfuse.target import Target
from tests.integrations.vllm.deployments import M3_EP8, build, parallel_config
from tests.integrations.vllm.dp_entries import data_parallel

UNIT = 2.0**-8
"""Of BF16's rounding, which a result has seven times at the most, and a sum over ranks once more."""


@pytest.mark.parametrize(("sizes", "symmetric"), [([4, 4], True), ([3, 9], False), ([7, 0], False)])
def test_the_sum_is_the_unsharded_layer(sizes: list[int], symmetric: bool, tmp_path: Path) -> None:
    found = launch_ranks(
        data_parallel,
        (sizes, symmetric),
        ranks=2,
        placement=Placement.CPU,
        log_dir=tmp_path,
        preload=("tests.integrations.vllm.dp_entries",),
    )
    for error, of_one_rank in found:
        assert error < 3 * UNIT
        assert of_one_rank > 0.3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dp_size": 1}, None),
        ({"dp_size": 2}, GATHERED),
        ({"dp_size": 2, "sp_size": 2}, GATHERED),
        ({"dp_size": 2, "pcp_size": 2}, f"{GATHERED} between ranks of prefill context parallelism"),
        ({"dp_size": 2, "all2all_backend": "mori"}, "mori"),
        ({"dp_size": 1, "all2all_backend": "passthrough"}, "passthrough"),
    ],
)
def test_how_tokens_are_exchanged(changes: dict[str, Any], named: str | None) -> None:
    config = parallel_config(M3_EP8)
    for name, value in changes.items():
        setattr(config, name, value)
    assert versions.exchange_of(config) == named
    assert EpfuseExperts._supports_parallel_config(config) is (named in (None, GATHERED))


def test_a_gathered_layer_is_ours_and_its_calls_are_as_long_as_all_ranks_tokens(monkeypatch) -> None:
    asked = []
    choose = layer.choose
    monkeypatch.setattr(layer, "choose", lambda facts: asked.append(facts) or choose(facts))
    built = build(M3_EP8.but(target=Target.SM90, dp_size=2), monkeypatch)
    assert built.quant_method.experts_cls is EpfuseExperts
    assert asked[0].all2all == GATHERED
    scheduler = SimpleNamespace(max_num_batched_tokens=8191)
    monkeypatch.setattr(
        vllm.config, "get_current_vllm_config_or_none", lambda: SimpleNamespace(scheduler_config=scheduler)
    )
    config = parallel_config(M3_EP8)
    for dp, sp, tokens in ((1, 1, 8191), (2, 1, 2 * 8191), (2, 4, 2 * 8192)):
        config.dp_size, config.sp_size = dp, sp
        assert versions._max_tokens(config) == tokens
