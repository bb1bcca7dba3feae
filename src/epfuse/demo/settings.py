"""What a run of the demo can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError

FORMS = (WeightFormat.DENSE, WeightFormat.MXFP8)
MOST_TOKENS = 2048
"""transformers' attention holds all of the [T, T] scores, in float64 too: 1.6 GB here."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the demo's MiniMax-M3; small, with the real one's E, K and kinds of layers.

    Args:
        hidden: H.
        intermediate: I of a routed expert and of the shared one.
        dense_intermediate: width of the dense layers' MLP.
        dense_layers: layers with full attention and a dense MLP; they come first.
        moe_layers: layers with block-sparse attention and experts.
        experts: E.
        top_k: K.
    """

    hidden: int = 128
    intermediate: int = 64
    dense_intermediate: int = 256
    dense_layers: int = 1
    moe_layers: int = 3
    experts: int = 128
    top_k: int = 4


@checks_enums
@dataclass(frozen=True)
class DemoSettings:
    """One run.

    Args:
        ranks: P; E must be a multiple of it.
        tokens: prompt tokens T at most, up to ``MOST_TOKENS``; a shorter text gives fewer.
        new_tokens: greedy tokens after the prompt.
        dtype: of weights and activations, a key of ``DTYPES``.
        weights: of the experts, one of ``FORMS``; MXFP8 ones are read at the numbers that they stand for by the
            untouched model too.
        seed: of the weights.
        size: the model's sizes.

    Raises:
        ConfigError: a value is out of range.
    """

    ranks: int = 8
    tokens: int = 256
    new_tokens: int = 16
    dtype: str = "float32"
    weights: WeightFormat = WeightFormat.DENSE
    seed: int = 0
    size: ModelSize = ModelSize()

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.tokens > MOST_TOKENS:
            raise ConfigError(f"tokens is {self.tokens}; it must be at most {MOST_TOKENS}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.weights not in FORMS:
            raise ConfigError(
                f"weights is {self.weights!r}; it must be one of {', '.join(form.value for form in FORMS)}"
            )
        if self.size.experts % self.ranks:
            raise ConfigError(
                f"ranks is {self.ranks}; it must divide the model's {self.size.experts} experts: the demonstration"
                " compares ranks by what each holds, and has no column for one expert more"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be in 0..2**63-1")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return DTYPES[self.dtype]
