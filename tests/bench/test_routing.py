from __future__ import annotations

import pytest
import torch

from epfuse.bench.routing import Routing, RoutingKind
from epfuse.config import LayerShape
from epfuse.errors import ConfigError

EP8 = LayerShape(64, 32, 128, 16, 4)
ALL_LOCAL = LayerShape(64, 32, 8, 8, 4)


def draw(text: str, shape: LayerShape = EP8, tokens: int = 4000, variant: int = 0) -> torch.Tensor:
    return Routing.parse(text).draw(shape, tokens, variant, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("text", ["uniform", "zipf:1.2", "zipf:0", "all-to:2"])
def test_text_is_what_was_parsed(text: str) -> None:
    assert str(Routing.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "uniform:1", "zipf", "zipf:x", "zipf:-1", "zipf:nan", "zipf:9", "all-to:0", "all-to:1.5", "all-to:", "x:2"],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="it must be uniform, zipf:S or all-to:N"):
        Routing.parse(text)


@pytest.mark.parametrize("text", ["uniform", "zipf:1.2", "all-to:2", "all-to:6"])
def test_a_token_has_k_different_experts(text: str) -> None:
    ids = draw(text)
    assert ids.shape == (4000, 4)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 128
    assert all(len(set(token)) == 4 for token in ids[:50].tolist())


def test_uniform_loads_all_experts_alike() -> None:
    load = torch.bincount(draw("uniform").flatten(), minlength=128)
    expected = 4000 * 4 / 128
    assert ((load - expected).abs() < 6 * expected**0.5).all()


def test_zipf_follows_the_law_and_the_first_rank_has_the_most_popular_expert() -> None:
    shape = LayerShape(64, 32, 128, 16, 1)  # K = 1: without the bend that comes from drawing without replacement
    load = torch.bincount(draw("zipf:1.2", shape, 200_000).flatten(), minlength=128)
    ordered = load.sort(descending=True).values.float()
    assert float(ordered[0] / ordered[9]) == pytest.approx(10**1.2, rel=0.1)
    assert int(load.argmax()) < 16
    places = load.argsort(descending=True)[:16] // 16  # the ranks of the 16 most popular experts: each has two
    assert sorted(places[:8].tolist()) == list(range(8))


def test_zipf_0_is_uniform() -> None:
    assert torch.equal(draw("zipf:0"), draw("uniform"))


def test_all_to_fewer_experts_than_k_fills_up_with_other_ranks_experts() -> None:
    ids = draw("all-to:2")
    assert ids[:, :2].unique().tolist() == [0, 1]
    assert int(ids[:, 2:].min()) >= 16


def test_all_to_takes_other_experts_in_the_next_draw() -> None:
    assert draw("all-to:2", variant=1)[:, :2].unique().tolist() == [2, 3]
    assert draw("all-to:3", variant=5)[:, :3].unique().tolist() == [0, 1, 15]  # 15, 16, 17 modulo 16


def test_all_to_more_experts_than_k_uses_them_alone() -> None:
    assert draw("all-to:6").unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_all_to_fewer_experts_than_k_without_other_ranks_repeats_them() -> None:
    assert draw("all-to:2", ALL_LOCAL, tokens=3).tolist() == [[0, 1, 0, 1]] * 3


def test_all_to_more_experts_than_are_local() -> None:
    with pytest.raises(ConfigError, match="this rank has 16 experts"):
        Routing(RoutingKind.ALL_TO, 17).check(EP8)
    Routing(RoutingKind.ALL_TO, 16).check(EP8)
