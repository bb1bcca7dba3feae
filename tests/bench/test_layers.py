from __future__ import annotations

import pytest

from epfuse import silu_gate
from epfuse.bench.layers import LAYERS, SIZES, make_layer
from epfuse.cli.bench import SHAPE_NAMES
from epfuse.config import MINIMAX_M3_EP8, LayerShape, SwiGLUOAI
from epfuse.errors import ConfigError


def sizes(**given: int) -> dict[str, int | None]:
    return {name: given.get(name) for name in SIZES}


def test_the_command_offers_every_layer() -> None:
    assert [*LAYERS, "custom"] == SHAPE_NAMES


def test_named_layers() -> None:
    assert make_layer("minimax-m3-ep8", sizes(), None).shape == MINIMAX_M3_EP8
    assert [LAYERS[f"minimax-m3-{name}"].ep_size for name in ("ep8", "ep4", "tp8")] == [8, 4, 1]
    # tensor parallelism slices what expert parallelism spreads: a rank holds as many numbers
    held = {layer.shape.local_experts * layer.expert_weights for name, layer in LAYERS.items() if name[-1] == "8"}
    assert len(held) == 1
    assert LAYERS["qwen3-235b"].activation == silu_gate()


def test_a_named_layer_with_other_sizes() -> None:
    layer = make_layer("gpt-oss-120b", sizes(ep_size=8), "silu")
    assert layer.shape == LayerShape(2880, 2880, 128, 16, 4)
    assert layer.activation == silu_gate()
    assert layer.name == "gpt-oss-120b with ep-size 8, silu"


def test_custom() -> None:
    layer = make_layer("custom", sizes(hidden=64, intermediate=32, experts=8, top_k=2), None)
    assert (layer.name, layer.shape, layer.activation) == ("custom", LayerShape(64, 32, 8, 8, 2), SwiGLUOAI())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden": 64, "experts": 8}, "'custom' needs --intermediate, --top-k"),
        ({"hidden": 64, "intermediate": 32, "experts": 8, "top_k": 9}, "top_k is 9"),
        ({"hidden": 64, "intermediate": 32, "experts": 8, "top_k": 2, "ep_size": 3}, "must divide experts=8"),
    ],
)
def test_refuses(given: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_layer("custom", sizes(**given), None)
