"""Frozen configuration values: enums and dataclasses, no booleans that change what a call means.

Letters, here and everywhere: T tokens, K top-k, H hidden, I intermediate, E global experts, L local experts,
P ranks, R = T*K routes, route id r = t*K + k.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from epfuse.arguments import integer, real
from epfuse.errors import ConfigError


class Path(enum.Enum):
    """How one layer call is computed: what the weights are in memory and what the activations are."""

    AUTO = "auto"
    """The policy chooses."""
    REFERENCE = "reference"
    """Plain PyTorch; the oracle of the others."""
    BF16 = "bf16"
    """Dense weights (BF16; FP16 and FP32 too), activations of the same dtype."""
    W8A16 = "w8a16"
    """MXFP8 weights, dequantised to BF16 in registers, which is exact; BF16 activations. On a CPU block FP8 weights
    too, FP16 and FP32 activations too, and an expert at a time."""
    W8A8 = "w8a8"
    """MXFP8 weights and activations quantised to MXFP8, multiplied by native FP8 dots; loses accuracy. With weights in
    ROW_FP8 the activations have one scale a row too."""
    BLOCK_FP8 = "block_fp8"
    """Block FP8 weights and activations quantised per 128 values, multiplied by native FP8 dots; loses accuracy. On
    Hopper very few rows stay in BF16."""


class Policy(enum.Enum):
    """Who decides how a layer keeps its weights and which path its calls take (`epfuse.policy.plan_layer`)."""

    AUTO = "auto"
    """Any supported target and shape, by measured tiles, the roofline and the memory that there is."""
    SEED_1782 = "seed-1782"
    """The gates of InferenceX pull request 1782 and of what it is stacked on: MiniMax-M3 on gfx942, nothing else."""


class Combine(enum.Enum):
    """How the rows of a token's routes are summed."""

    DETERMINISTIC = "deterministic"
    """A row per route, weighted and rounded once; then a sum in FP32 in route order, rounded once. Repeatable."""
    ATOMIC = "atomic"
    """Weighted FP32 rows are added to a float32 ``[T, H]`` buffer as they are finished, by relaxed atomics; the buffer
    is rounded once. One rounding less, no ``[R, H]`` tensor, and an order that changes from run to run."""


class WeightFormat(enum.Enum):
    """How a layer's weights lie in memory; a layer may keep several, of which the reference reads the first one here.

    What a checkpoint had comes before what was made of it, and what has lost bits comes last. A format's code is the
    file of its name in `epfuse.weights` (`epfuse.weights.formats`).
    """

    MXFP8 = "mxfp8"
    """E4M3 values and E8M0 scale bytes, row-major, as checkpoints have them."""
    MXFP8_FNUZ = "mxfp8_fnuz"
    """MXFP8 with E4M3FNUZ values, the FP8 that gfx942 multiplies; scales are doubled to match."""
    FRAGMENT = "fragment"
    """MXFP8 in the order in which Hopper's tensor cores take it."""
    BLOCK_FP8 = "block_fp8"
    """E4M3 values with a float32 scale per 128x128 block."""
    BLOCK_FP8_FNUZ = "block_fp8_fnuz"
    """Block FP8 with E4M3FNUZ values."""
    DENSE = "dense"
    """BF16, FP16 or FP32, row-major."""
    ROW_FP8 = "row_fp8"
    """MXFP8's numbers with one scale a row, in the order in which Hopper's tensor cores multiply FP8 by FP8."""


class Bias(enum.Enum):
    """Whether a layer's projections add biases to their products."""

    NONE = "none"
    ADDED = "added"
    """To one of them or both: in FP32, before the activation, and before the router weight."""


class Activation(ABC):
    """What stands between the two GEMMs: a function of a gate and an up value, or of one value.

    A kind is a class, made of its ``parameters`` in their order.

    Attributes:
        kind: what kernels and reference know it by.
        formula: what errors call it.
        inputs: rows of w13 for one of its results: 2, a gate and an up row, or 1 where there is no gate.
    """

    kind: ClassVar[str]
    formula: ClassVar[str]
    inputs: ClassVar[int] = 2

    @property
    @abstractmethod
    def parameters(self) -> tuple[float, ...]:
        """What kernels take at run time, in the order of the device code; floats, as 1 would be a constant of them."""

    @property
    def bounded(self) -> bool:
        """Whether a bound of its results is known before they are, close enough for FP8 in one scale a row."""
        return False


@dataclass(frozen=True)
class SwiGLUOAI(Activation):
    """The clamped SwiGLU of gpt-oss and MiniMax-M3.

    ``gate = min(g, limit); up = clamp(u, -limit, limit); y = gate * sigmoid(alpha * gate) * (up + beta)``

    Args:
        alpha: sigmoid gain, finite.
        beta: added to the clamped up projection, finite.
        limit: clamp bound, positive; ``inf`` for none.

    Raises:
        ConfigError: a parameter is out of range.
    """

    kind: ClassVar[str] = "swiglu_oai"
    formula: ClassVar[str] = "SwiGLU-OAI (alpha, limit) and silu(gate) * up, with or without a limit"

    alpha: float = 1.702
    beta: float = 1.0
    limit: float = 7.0

    @property
    def parameters(self) -> tuple[float, ...]:
        """alpha, beta, limit."""
        return self.alpha, self.beta, self.limit

    @property
    def bounded(self) -> bool:
        """As `Activation.bounded`: where beta is not small beside limit, and alpha not beside 1 / limit.

        The lengths of rows bound a gate, which typically is 2^4 to 2^6 smaller. Were ``u + beta`` known no better, the
        two together would be too far off. Of a negative gate the sigmoid leaves 0.28 / alpha at most.
        """
        return self.alpha * self.limit > 0.28 and self.limit <= 16 * abs(self.beta)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "limit"):
            # floats, whatever was given: a kernel would take the integer 1 for a constant, and be another kernel
            object.__setattr__(self, name, real(f"SwiGLUOAI.{name}", getattr(self, name)))
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"SwiGLUOAI.{name} is {getattr(self, name)!r}; it must be finite")
        if not self.limit > 2.0**-126:
            raise ConfigError(
                f"SwiGLUOAI.limit is {self.limit!r}; it must be positive, above float32's smallest normal number"
                " (inf for no clamp)"
            )


def silu_gate() -> SwiGLUOAI:
    """``silu(gate) * up``, as in Qwen- and Mixtral-like experts: SwiGLU-OAI with alpha 1, beta 0, no clamp."""
    return SwiGLUOAI(alpha=1.0, beta=0.0, limit=math.inf)


@dataclass(frozen=True)
class GELUTanh(Activation):
    """``gelu(gate) * up`` with GELU's approximation by tanh, as in Gemma's experts."""

    kind: ClassVar[str] = "gelu_tanh"
    formula: ClassVar[str] = "gelu_tanh(gate) * up"

    @property
    def parameters(self) -> tuple[float, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class SoftcappedSwiGLU(Activation):
    """``cap(gate, gate_cap) * sigmoid(gate) * cap(up, up_cap)`` with ``cap(x, c) = c * tanh(x / c)``: Inkling 2.

    Args:
        gate_cap: bound of the linear gate factor, positive and finite; the sigmoid sees the gate as it is.
        up_cap: bound of up, positive and finite.

    Raises:
        ConfigError: a parameter is out of range.
    """

    kind: ClassVar[str] = "softcapped_swiglu"
    formula: ClassVar[str] = "softcap(gate) * sigmoid(gate) * softcap(up)"

    gate_cap: float
    up_cap: float

    @property
    def parameters(self) -> tuple[float, ...]:
        """gate_cap, up_cap."""
        return self.gate_cap, self.up_cap

    def __post_init__(self) -> None:
        for name in ("gate_cap", "up_cap"):
            object.__setattr__(self, name, real(f"SoftcappedSwiGLU.{name}", getattr(self, name)))
            if not 2.0**-126 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"SoftcappedSwiGLU.{name} is {getattr(self, name)!r}; it must be positive and finite, above"
                    " float32's smallest normal number"
                )


@dataclass(frozen=True)
class ReLU2(Activation):
    """``max(x, 0) ** 2`` of one projection, without a gate, as in Nemotron-H's experts."""

    kind: ClassVar[str] = "relu2"
    formula: ClassVar[str] = "relu(x) ** 2 without a gate"
    inputs: ClassVar[int] = 1

    @property
    def parameters(self) -> tuple[float, ...]:
        """None."""
        return ()


ACTIVATIONS: tuple[type[Activation], ...] = (SwiGLUOAI, GELUTanh, SoftcappedSwiGLU, ReLU2)
"""All kinds that there are."""


def known_activations() -> str:
    """What epfuse computes between the projections, for an error that refuses something else."""
    *others, last = (kind.formula for kind in ACTIVATIONS)
    return f"epfuse computes {', '.join(others)}, and {last}"


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one rank's expert layer.

    Args:
        hidden: H, the model dimension.
        intermediate: I, the width between the two projections.
        experts: E, global experts.
        local_experts: L, experts that this rank holds.
        top_k: K, routes per token; may be more than E: ids may repeat, or name no expert.

    Raises:
        ConfigError: a size is no integer or less than 1, or L is more than E.
    """

    hidden: int
    intermediate: int
    experts: int
    local_experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "experts", "local_experts", "top_k"):
            object.__setattr__(self, name, integer(f"LayerShape.{name}", getattr(self, name), least=1))
        if self.local_experts > self.experts:
            raise ConfigError(f"LayerShape.local_experts is {self.local_experts}, more than experts={self.experts}")

    def with_distinct_experts(self) -> LayerShape:
        """The shape, if a router can choose K different experts for each token, as models' routers do.

        Raises:
            ConfigError: K is more than E.
        """
        if self.top_k > self.experts:
            raise ConfigError(f"LayerShape.top_k is {self.top_k}, more than experts={self.experts}")
        return self

    def rank_of(self, ep_size: int = 1, tp_size: int = 1) -> LayerShape:
        """One rank's share of a layer that one rank would hold whole: E/P whole experts, or a slice of each of them.

        Args:
            ep_size: ranks that the experts are spread over.
            tp_size: ranks that every expert's I is sliced over.

        Raises:
            ConfigError: a number is less than 1, or does not divide.
        """
        for name, ranks in (("experts", ep_size), ("intermediate", tp_size)):
            if ranks < 1 or getattr(self, name) % ranks:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a multiple of {ranks} ranks")
        return replace(self, local_experts=self.experts // ep_size, intermediate=self.intermediate // tp_size)


MINIMAX_M3 = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=128, top_k=4)
"""transformers' MiniMaxM3VLTextConfig defaults."""
GPT_OSS_120B = LayerShape(hidden=2880, intermediate=2880, experts=128, local_experts=128, top_k=4)
"""The config.json of openai/gpt-oss-120b."""
GPT_OSS_20B = LayerShape(hidden=2880, intermediate=2880, experts=32, local_experts=32, top_k=4)
"""The config.json of openai/gpt-oss-20b."""
QWEN3_235B = LayerShape(hidden=4096, intermediate=1536, experts=128, local_experts=128, top_k=8)
"""The config.json of Qwen/Qwen3-235B-A22B."""
MINIMAX_M3_EP8 = MINIMAX_M3.rank_of(ep_size=8)
"""One rank of MiniMax-M3 under expert parallelism over 8 ranks."""
