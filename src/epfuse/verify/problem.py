"""What one run of the suite verifies: the layer's sizes, the device, the token counts and the paths."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from epfuse.arguments import checks_enums, integer
from epfuse.config import MINIMAX_M3_EP8, Activation, Bias, GELUTanh, LayerShape, ReLU2, SoftcappedSwiGLU, SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.target import Target, target_of
from epfuse.verify.budget import LEAST_SIZE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SHAPES = {
    # Multiples of 32, as MXFP8 needs, but of no tile, so that every kernel's last block is partial; seconds on a CPU.
    "small": LayerShape(hidden=160, intermediate=96, experts=16, local_experts=4, top_k=4),
    "minimax-m3": MINIMAX_M3_EP8,
}

ACTIVATIONS: dict[str, Activation] = {
    "swiglu-oai": SwiGLUOAI(),
    "gelu-tanh": GELUTanh(),
    "softcapped-swiglu": SoftcappedSwiGLU(gate_cap=4.0, up_cap=25.0),
    "relu2": ReLU2(),
}

DEFAULT_TOKENS = (1, 3, 37, 300)


@checks_enums
@dataclass(frozen=True)
class Problem:
    """One layer, split over ``ep_size`` ranks that one device plays in turn.

    Args:
        hidden: H, at least `LEAST_SIZE`.
        intermediate: I, at least `LEAST_SIZE`.
        experts: E, a multiple of ``ep_size``.
        top_k: K, at most E.
        ep_size: P.
        tokens: the token counts T to run, each at least 1.
        dtype: of weights and activations.
        device: where everything lives.
        seed: of weights, activations and routings.
        activation: between the projections.
        bias: of both projections, as large as their products, or of none.

    Raises:
        ConfigError: a size is out of range.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    ep_size: int
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seed: int
    activation: Activation = field(default_factory=SwiGLUOAI)
    bias: Bias = Bias.NONE

    def __post_init__(self) -> None:
        for name, least in (("ep_size", 1), ("experts", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        if self.experts % self.ep_size:
            raise ConfigError(
                f"ep_size is {self.ep_size}; it must divide experts={self.experts}: the suite draws as many experts for"
                " each rank (fused_experts itself takes ranks with one expert more or less)"
            )
        _ = self.shape.with_distinct_experts()
        for name in ("hidden", "intermediate"):
            if getattr(self, name) < LEAST_SIZE:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; to be verified it must be at least {LEAST_SIZE}: an error is"
                    " judged beside a row's own numbers, and few of them may all be near zero"
                )
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigError(f"tokens is {self.tokens}; it must name at least one count, each at least 1")

    @property
    def local_experts(self) -> int:
        """L, experts of one rank."""
        return self.experts // self.ep_size

    @property
    def shape(self) -> LayerShape:
        """The sizes of one rank's layer."""
        return LayerShape(self.hidden, self.intermediate, self.experts, self.local_experts, self.top_k)

    @property
    def has_true_size(self) -> bool:
        """Whether an expert is as large as MiniMax-M3's."""
        true = MINIMAX_M3_EP8
        return (self.hidden, self.intermediate) == (true.hidden, true.intermediate)

    @property
    def target(self) -> Target:
        """The target of ``device``."""
        return target_of(self.device)
