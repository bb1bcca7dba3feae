"""What one run of the suite verifies: the layer's sizes, the device, the token counts and the paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.config import MINIMAX_M3_EP8, LayerShape, Path
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import decide
from epfuse.target import Target, target_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SHAPES = {
    # Multiples of 8 but of no tile, so that every kernel's last block is partial; seconds on a CPU.
    "small": LayerShape(hidden=136, intermediate=88, experts=16, local_experts=4, top_k=4),
    "minimax-m3": MINIMAX_M3_EP8,
}

DEFAULT_TOKENS = (1, 3, 37, 300)


@dataclass(frozen=True)
class Problem:
    """One layer, split over ``ep_size`` ranks that one device plays in turn.

    Args:
        hidden: H.
        intermediate: I.
        experts: E, a multiple of ``ep_size``.
        top_k: K, at most E.
        ep_size: P.
        tokens: the token counts T to run, each at least 1.
        dtype: of weights and activations.
        device: where everything lives.
        seed: of weights, activations and routings.

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

    def __post_init__(self) -> None:
        if self.ep_size < 1 or self.experts % self.ep_size:
            raise ConfigError(f"ep_size is {self.ep_size}; it must divide experts={self.experts}")
        LayerShape(self.hidden, self.intermediate, self.experts, self.local_experts, self.top_k)
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigError(f"tokens is {self.tokens}; it must name at least one count, each at least 1")

    @property
    def local_experts(self) -> int:
        """L, experts of one rank."""
        return self.experts // self.ep_size

    @property
    def target(self) -> Target:
        """The target of ``device``."""
        return target_of(self.device)


def paths_of(problem: Problem, choice: str) -> tuple[Path, ...]:
    """The paths to verify.

    Args:
        problem: its device decides what can run.
        choice: ``all`` for every path that the device runs, ``auto`` for the policy's choices, or a path's name.

    Raises:
        UnsupportedTarget: the device can't run the named path.
        ConfigError: no path has that name.
    """
    if choice != "all" and choice not in [path.value for path in Path]:
        raise ConfigError(f"path is {choice!r}; it must be 'all' or one of {', '.join(p.value for p in Path)}")
    asked = [path for path in Path if path is not Path.AUTO] if choice == "all" else [Path(choice)]
    found: list[Path] = []
    for path in asked:
        try:
            decided = [_decide(problem, path, tokens) for tokens in problem.tokens]
        except UnsupportedTarget:
            if choice != "all":
                raise
            continue
        found.extend(path for path in decided if path not in found)
    return tuple(found)


def _decide(problem: Problem, path: Path, tokens: int) -> Path:
    shape = LayerShape(problem.hidden, problem.intermediate, problem.experts, problem.local_experts, problem.top_k)
    return decide(path, problem.target, shape, tokens).path
