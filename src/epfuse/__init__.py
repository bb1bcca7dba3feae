"""epfuse: the routed experts of a mixture-of-experts model, on one expert-parallel rank.

The public names are loaded on first use, so that importing a part that needs no torch (the command line's ``--help``)
stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epfuse.api import fused_experts
    from epfuse.config import Combine, GELUTanh, LayerShape, Path, ReLU2, SoftcappedSwiGLU, SwiGLUOAI, silu_gate
    from epfuse.errors import EpfuseError
    from epfuse.expert_map import ExpertMap
    from epfuse.families.registry import scratch_size
    from epfuse.scratch import Scratch
    from epfuse.target import Target, target_of
    from epfuse.weights.experts import ExpertWeights
    from epfuse.weights.layouts import WeightLayout

__version__ = "0.2.0"

_MODULE_OF = {
    "Combine": "epfuse.config",
    "EpfuseError": "epfuse.errors",
    "ExpertMap": "epfuse.expert_map",
    "ExpertWeights": "epfuse.weights.experts",
    "GELUTanh": "epfuse.config",
    "LayerShape": "epfuse.config",
    "Path": "epfuse.config",
    "ReLU2": "epfuse.config",
    "Scratch": "epfuse.scratch",
    "SoftcappedSwiGLU": "epfuse.config",
    "SwiGLUOAI": "epfuse.config",
    "Target": "epfuse.target",
    "WeightLayout": "epfuse.weights.layouts",
    "fused_experts": "epfuse.api",
    "scratch_size": "epfuse.families.registry",
    "silu_gate": "epfuse.config",
    "target_of": "epfuse.target",
}

__all__ = [
    "Combine",
    "EpfuseError",
    "ExpertMap",
    "ExpertWeights",
    "GELUTanh",
    "LayerShape",
    "Path",
    "ReLU2",
    "Scratch",
    "SoftcappedSwiGLU",
    "SwiGLUOAI",
    "Target",
    "WeightLayout",
    "fused_experts",
    "scratch_size",
    "silu_gate",
    "target_of",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'epfuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
