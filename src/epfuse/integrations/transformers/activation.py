"""Which activation a transformers experts module has.

It is read from what the module and its configuration say, and then held against the module's own code, far out and
around every limit that either names. Numbers alone don't tell: a clamp at 16 is invisible in -12..12.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from epfuse.config import SwiGLUOAI
from epfuse.errors import ConfigError
from epfuse.stages.activation_reference import swiglu_oai

_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_LIMITING = re.compile(r"limit|clamp|clip|cap|alpha|beta|bound|thresh", re.IGNORECASE)
_LARGEST = 2.0**126
"""Beyond all that float32 products of gate and up may reach: a module may compute in float32."""
_KNOWN = "it computes SwiGLU-OAI (alpha, limit) and silu(gate) * up, with or without a limit"


def activation_of(name: str, module: Any) -> SwiGLUOAI:
    """The activation of a transformers experts module.

    The module says it with ``act_fn`` (silu, or none where the class writes it out), ``swiglu_alpha`` or ``alpha``,
    ``swiglu_beta`` or ``beta``, and ``swiglu_limit`` or ``limit``; where it has no such attribute, its configuration's
    ``swiglu_*`` counts. gpt-oss and MiniMax-M3 are ``SwiGLUOAI(alpha, 1, limit)``; DeepSeek-V4, GLM-5-Next and HY-V4
    ``SwiGLUOAI(1, 0, limit)``. Then ``_apply_gate`` and the whole forward, with small weights of ones and zeros in
    place of the module's, must give the same numbers.

    Args:
        name: the module's, for errors.
        module: with ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``, on any device, meta too; neither
            is read or changed.

    Raises:
        ConfigError: the module computes something else, says two things, or can't be run on a few numbers.
    """
    where = f"{name} ({type(module).__name__})"
    act_fn = getattr(module, "act_fn", None)
    if act_fn is not None and not _is_silu(act_fn):
        kind = getattr(act_fn, "__name__", None) or type(act_fn).__name__
        raise ConfigError(f"{where} has an activation that epfuse does not know, act_fn {kind}; {_KNOWN}")
    alpha = _said(where, module, "alpha")
    beta = _said(where, module, "beta")
    limit = _said(where, module, "limit")
    try:
        activation = SwiGLUOAI(
            alpha=1.0 if alpha is None else alpha,
            beta=float(alpha is not None) if beta is None else beta,
            limit=math.inf if limit is None else limit,
        )
    except ConfigError as reason:
        raise ConfigError(f"{where}: {reason}") from reason
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            fault = _contradiction(module, activation)
        except Exception as reason:  # the module's own code may raise anything
            raise ConfigError(
                f"{where} can't be confirmed to have an activation that epfuse knows: on a few numbers it raises"
                f" {type(reason).__name__}: {reason}"
            ) from reason
    if fault is not None:
        raise ConfigError(
            f"{where} has an activation that epfuse does not know: it says {activation}, but {fault}; {_KNOWN}"
        )
    return activation


def _is_silu(act_fn: Any) -> bool:
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(act_fn).__mro__}
    return act_fn is nn.functional.silu or not kinds.isdisjoint(_SILU)


def _said(where: str, module: Any, what: str) -> float | None:
    """The number that the module gives for ``what``, else its configuration; None where neither has one."""
    names = [name for name in (f"swiglu_{what}", what) if hasattr(module, name)]
    found = {name: getattr(module, name) for name in names}
    if not names:
        found = {f"config.swiglu_{what}": getattr(getattr(module, "config", None), f"swiglu_{what}", None)}
    numbers = {name: value for name, value in found.items() if value is not None}
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{where} has an activation that epfuse does not know: {name} is {value!r}, no number")
    if len(set(numbers.values())) > 1:
        both = ", ".join(f"{name}={value!r}" for name, value in numbers.items())
        raise ConfigError(f"{where} has an activation that epfuse does not know: {both} contradict each other")
    return next(iter(numbers.values()), None)


def _contradiction(module: Any, activation: SwiGLUOAI) -> str | None:
    """Where the module's own code gives other numbers than ``activation``; None where it doesn't."""
    points = _points(module, activation)
    gate = points[:, None].expand(-1, points.numel())
    pairs = torch.stack((gate, gate.T)).flatten(1)
    pairs = pairs[:, pairs[0].abs() * (pairs[1].abs() + 2) < _LARGEST]
    own_gate = getattr(module, "_apply_gate", None)
    if own_gate is not None:
        gate_up = pairs.T.contiguous()
        fault = _difference(own_gate(gate_up).flatten(), pairs, activation)
        if fault is not None:
            return f"_apply_gate {fault}"
    few = ((pairs.abs() >= 0.25) & (pairs.abs() <= 2.0)).any(0)
    return _forward_contradiction(module, pairs[:, few], activation)


def _points(module: Any, activation: SwiGLUOAI) -> torch.Tensor:
    """Sizes to try, of both signs: around 0, far out, and around all numbers that could be a limit."""
    limits = {activation.limit, *_named_limits(module), *_named_limits(getattr(module, "config", None))}
    around = [
        limit * factor
        for limit in sorted(limits)
        if 2.0**-20 < limit < 2.0**100
        for factor in (0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0)
    ]
    far = [2.0**exponent for exponent in range(-10, 124, 3)]
    near = torch.linspace(0.0, 14.0, 36, dtype=torch.float64, device="cpu").tolist()
    sizes = torch.tensor(sorted({*near, *far, *around}), dtype=torch.float64, device="cpu")
    return torch.cat((-sizes, sizes))


def _named_limits(owner: Any) -> Iterator[float]:
    """Numbers of a module or configuration under a name that sounds like a bound, at most 16."""
    found = [
        abs(float(value))
        for name, value in vars(owner or object).items()
        if _LIMITING.search(name) and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    yield from found[:16]


def _difference(own: torch.Tensor, pairs: torch.Tensor, activation: SwiGLUOAI) -> str | None:
    gate, up = pairs
    expected = swiglu_oai(pairs.T, activation).flatten()
    # a module may compute in float32, where a sigmoid of -90 is a subnormal or 0
    tolerance = 1e-5 * expected.abs() + 1e-30 * (up.abs() + 1)
    wrong = ~((own - expected).abs() <= tolerance)
    if not bool(wrong.any()):
        return None
    at = int(wrong.nonzero()[0])
    return (
        f"at gate {float(gate[at]):g}, up {float(up[at]):g} is {float(own[at]):g}, and that would be"
        f" {float(expected[at]):g}"
    )


def _forward_contradiction(module: Any, pairs: torch.Tensor, activation: SwiGLUOAI) -> str | None:
    """The same for the whole forward of a copy of the module with weights of ones and zeros.

    ``down_proj`` hands every intermediate value on twice. What the copy would show: interleaved gate and up rows,
    another factor than the router's weight, a norm, an expert that isn't there and yet adds something.
    """
    width = 64
    tokens = -(-pairs.shape[1] // width)
    pairs = nn.functional.pad(pairs, (0, tokens * width - pairs.shape[1]))
    hidden = pairs.view(2, tokens, width).transpose(0, 1).reshape(tokens, 2 * width)
    experts = module.gate_up_proj.shape[0]
    small = copy.copy(module)
    eye = torch.eye(2 * width, dtype=torch.float64, device="cpu")
    weights = {"gate_up_proj": eye, "down_proj": (eye[:, :width] + eye[:, width:]).contiguous()}
    small.__dict__["_parameters"] = {
        **module._parameters,
        **{name: nn.Parameter(w.expand(experts, -1, -1), requires_grad=False) for name, w in weights.items()},
    }
    small.training = False
    if hasattr(module, "config"):
        small.config = copy.copy(module.config)
        small.config._experts_implementation_internal = "eager"  # the property would set those inside it, too

    def forward(ids: list[int], factors: list[float], held: float) -> torch.Tensor:
        index = torch.tensor([ids], dtype=torch.int64, device="cpu").repeat(tokens, 1)
        scores = torch.tensor([factors], dtype=torch.float64, device="cpu").repeat(tokens, 1)
        out: torch.Tensor = type(small).forward(small, hidden.clone(), index, scores)
        return out.view(tokens, 2, width).transpose(0, 1).reshape(2, -1) / held

    both = [0, experts - 1][:experts]
    outputs = {"the forward": forward(both, [0.5, 0.25][:experts], 0.75 if experts > 1 else 0.5)}
    with contextlib.suppress(Exception):  # a module that raises here is never given such an id
        outputs["the forward with an id beyond the last expert's"] = forward([0, experts], [0.5, 0.5], 0.5)
    for what, halves in outputs.items():
        for own in halves:
            fault = _difference(own, pairs, activation)
            if fault is not None:
                return f"{what} {fault}"
    return None
