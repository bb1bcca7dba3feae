"""The expert layers that can be benchmarked by name."""

from __future__ import annotations

from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import GPT_OSS_20B, GPT_OSS_120B, MINIMAX_M3, QWEN3_235B, Bias, LayerShape, SwiGLUOAI, silu_gate
from epfuse.errors import ConfigError


@checks_enums
@dataclass(frozen=True)
class Layer:
    """One rank's expert layer.

    Attributes:
        name: for people; two layers are the same if the rest is.
        shape: its sizes.
        activation: between the two projections.
        bias: of both projections, as large as their products, or of none.
    """

    name: str
    shape: LayerShape
    activation: SwiGLUOAI
    bias: Bias = Bias.NONE

    @property
    def ep_size(self) -> int:
        """P, the ranks that share the experts."""
        return self.shape.experts // self.shape.local_experts

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert: w13 and w2."""
        return 3 * self.shape.hidden * self.shape.intermediate


ACTIVATIONS = {"swiglu-oai": SwiGLUOAI(), "silu": silu_gate()}
"""Name -> activation: MiniMax-M3's and gpt-oss' clamped SwiGLU, and silu(gate) * up."""

CUSTOM = "custom"
"""The name of a layer that has no sizes of its own."""

LAYERS = {
    layer.name: layer
    for layer in (
        Layer("minimax-m3-ep8", MINIMAX_M3.rank_of(ep_size=8), SwiGLUOAI()),
        Layer("minimax-m3-ep4", MINIMAX_M3.rank_of(ep_size=4), SwiGLUOAI()),
        Layer("minimax-m3-ep16", MINIMAX_M3.rank_of(ep_size=16), SwiGLUOAI()),
        # tensor parallelism slices every expert: all of them are local, each with an eighth of I
        Layer("minimax-m3-tp8", MINIMAX_M3.rank_of(tp_size=8), SwiGLUOAI()),
        Layer("gpt-oss-120b", GPT_OSS_120B, SwiGLUOAI()),
        Layer("gpt-oss-20b", GPT_OSS_20B, SwiGLUOAI()),
        Layer("gpt-oss-120b-biases", GPT_OSS_120B, SwiGLUOAI(), Bias.ADDED),
        Layer("gpt-oss-20b-biases", GPT_OSS_20B, SwiGLUOAI(), Bias.ADDED),
        Layer("qwen3-235b", QWEN3_235B, silu_gate()),
        Layer("small", LayerShape(512, 256, 16, 4, 4), SwiGLUOAI()),
    )
}
"""gpt-oss is with its biases under the names that say so, without them as other people's kernels are timed; and with
gate rows before up rows: a checkpoint's interleaved rows are put into this order when they are loaded. ``small`` is for
a CPU.
"""

SIZES = ("hidden", "intermediate", "experts", "top_k", "ep_size")


def make_layer(name: str, sizes: dict[str, int | None], activation: str | None) -> Layer:
    """A named layer, with some of its sizes replaced.

    Args:
        name: a key of `LAYERS`, or `CUSTOM`.
        sizes: a value for each of `SIZES`; None keeps the named layer's. A custom layer needs all of them but
            ``ep_size`` (1).
        activation: a key of `ACTIVATIONS`; None keeps the named layer's, and is swiglu-oai for a custom one.

    Raises:
        ConfigError: a size is missing or out of range.
    """
    given = {size: value for size, value in sizes.items() if value is not None}
    known: dict[str, int] = {"ep_size": 1}
    gate, bias = SwiGLUOAI(), Bias.NONE
    if name != CUSTOM:
        named = LAYERS[name]
        if not given and activation is None:
            return named
        shape, gate, bias = named.shape, named.activation, named.bias
        known = {size: getattr(shape, size) for size in SIZES[:-1]} | {"ep_size": named.ep_size}
    missing = [size for size in SIZES if size not in known | given]
    if missing:
        raise ConfigError(f"shape {CUSTOM!r} needs --{', --'.join(missing).replace('_', '-')}")
    chosen = known | given
    experts, ep_size = chosen["experts"], chosen["ep_size"]
    if ep_size < 1 or experts % ep_size:
        raise ConfigError(
            f"ep_size is {ep_size}; it must divide experts={experts}: a layer is timed on its first rank, which must"
            " stand for all (fused_experts itself takes ranks with one expert more or less)"
        )
    changes = [f"{size.replace('_', '-')} {value}" for size, value in given.items()]
    if activation is not None:
        gate = ACTIVATIONS[activation]
        changes.append(activation)
    shape = LayerShape(chosen["hidden"], chosen["intermediate"], experts, experts // ep_size, chosen["top_k"])
    shape.with_distinct_experts()
    return Layer(name if name == CUSTOM else f"{name} with {', '.join(changes)}", shape, gate, bias)
