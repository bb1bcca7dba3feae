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

from epfuse.config import Activation, GELUTanh, ReLU2, SoftcappedSwiGLU, SwiGLUOAI, known_activations
from epfuse.errors import ConfigError
from epfuse.integrations.transformers.layout import layout_of, names_of
from epfuse.stages.activation_reference import activated
from epfuse.weights.layouts import GateUpRows, MatrixOrder

_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_GELU_TANH = ("transformers.activations.GELUTanh",)
_RELU2 = ("transformers.activations.ReLUSquaredActivation",)
_CAPPED = ("gate", "up")
_LIMITING = re.compile(r"limit|clamp|clip|cap|alpha|beta|bound|thresh", re.IGNORECASE)
_OF_A_MODULE = ("act_fn", *(f"{prefix}{what}" for prefix in ("", "swiglu_") for what in ("alpha", "beta", "limit")))
_LARGEST = 2.0**126
"""Beyond all that float32 products of gate and up may reach: a module may compute in float32."""


def activation_of(name: str, module: Any) -> Activation:
    """The activation of a transformers experts module.

    ``act_fn`` says which kind it is; none, where the class writes it out, and silu are `SwiGLUOAI`. Its numbers are
    ``swiglu_alpha`` or ``alpha``, ``swiglu_beta`` or ``beta``, and ``swiglu_limit`` or ``limit``; where the module has
    no such attribute, its configuration's ``swiglu_*`` counts. gpt-oss and MiniMax-M3 are ``SwiGLUOAI(alpha, 1,
    limit)``; DeepSeek-V4, GLM-5-Next and HY-V4 ``SwiGLUOAI(1, 0, limit)``. Then ``_apply_gate`` and the whole forward,
    with small weights of ones and zeros, and biases, in place of the module's, must give the same numbers.

    Args:
        name: the module's, for errors.
        module: with ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``, or as its flags say that they lie,
            on any device, meta too; neither is read or changed.

    Raises:
        ConfigError: the module computes something else, says two things, or can't be run on a few numbers.
    """
    where = f"{name} ({type(module).__name__})"
    activation = _said_kind(where, module)
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
            f"{where} has an activation that epfuse does not know: it says {activation}, but {fault};"
            f" {known_activations()}"
        )
    return activation


def said_of(module: nn.Module) -> tuple[object, ...]:
    """What `activation_of` reads of a module itself, which its own code reads at each call; not its configuration's."""
    own = module.__dict__
    return (own["_modules"].get("act_fn"), *map(own.get, _OF_A_MODULE))


def _said_kind(where: str, module: Any) -> Activation:
    """What the module says that it has."""
    act_fn, gated = getattr(module, "act_fn", None), getattr(module, "has_gate", True)
    try:
        if gated and (act_fn is None or act_fn is nn.functional.silu or _is_a(act_fn, _SILU)):
            alpha, beta, limit = (_said(where, module, what) for what in ("alpha", "beta", "limit"))
            return SwiGLUOAI(
                alpha=1.0 if alpha is None else alpha,
                beta=float(alpha is not None) if beta is None else beta,
                limit=math.inf if limit is None else limit,
            )
        gate_cap, up_cap = (getattr(getattr(act_fn, f"{what}_softcap", None), "softcap", None) for what in _CAPPED)
        if gated and gate_cap is not None and up_cap is not None:
            return SoftcappedSwiGLU(gate_cap, up_cap)
    except ConfigError as reason:
        raise ConfigError(f"{where}: {reason}") from reason
    if gated and (_is_a(act_fn, _GELU_TANH) or (isinstance(act_fn, nn.GELU) and act_fn.approximate == "tanh")):
        return GELUTanh()
    if not gated and _is_a(act_fn, _RELU2):
        return ReLU2()
    kind = getattr(act_fn, "__name__", None) or type(act_fn).__name__
    without = "" if gated else " without a gate"
    raise ConfigError(
        f"{where} has an activation that epfuse does not know, act_fn {kind}{without}; {known_activations()}"
    )


def _is_a(act_fn: Any, kinds: tuple[str, ...]) -> bool:
    return not {f"{kind.__module__}.{kind.__qualname__}" for kind in type(act_fn).__mro__}.isdisjoint(kinds)


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


def _contradiction(module: Any, activation: Activation) -> str | None:
    """Where the module's own code gives other numbers than ``activation``; None where it doesn't."""
    points = _points(module, activation)
    if activation.inputs == 1:
        return _forward_contradiction(module, points[points.abs() < _LARGEST**0.5][None], activation)
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


def _points(module: Any, activation: Activation) -> torch.Tensor:
    """Sizes to try, of both signs: around 0, far out, and around all numbers that could be a limit."""
    limits = {*activation.parameters, *_named_limits(module), *_named_limits(getattr(module, "config", None))}
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


def _difference(own: torch.Tensor, values: torch.Tensor, activation: Activation, added: float = 0.0) -> str | None:
    """Where ``own`` is not the activation of ``values`` ``[inputs, n]``, plus ``added``."""
    expected = activated(values.T, activation).flatten() + added
    # a module may compute in float32, where a sigmoid of -90 is a subnormal or 0, and -0.999 + 1 has few bits
    tolerance = 1e-5 * expected.abs() + 1e-30 * (values[-1].abs() + 1)
    if isinstance(activation, GELUTanh):  # which torch computes with 1 + tanh(..): near -1 that has no bits either
        tolerance += 1e-14 * values.prod(0).abs()
    for part in range(values.shape[0]):
        rounded = values.clone()
        rounded[part] *= 1 + 2**-22
        tolerance += (activated(rounded.T, activation).flatten() + added - expected).abs()
    wrong = ~((own - expected).abs() <= tolerance)
    if not bool(wrong.any()):
        return None
    at = int(wrong.nonzero()[0])
    point = ", up ".join(f"{float(value):g}" for value in values[:, at])
    return f"at gate {point} is {float(own[at]):g}, and that would be {float(expected[at]):g}"


_WIDTH = 64
"""I of the small copy."""
_BIASES = (0.5, -0.25, 0.75)
"""Of gate, up and down in the small copy, where the module has biases."""


def _forward_contradiction(module: Any, values: torch.Tensor, activation: Activation) -> str | None:
    """The same for the whole forward of a copy of the module with weights of ones and zeros.

    ``down_proj`` hands every intermediate value on, once for each value that it is made of. What the copy would show:
    gate and up rows in another order than the module's flags say, transposed weights, another factor than the router's
    weight, a norm, an expert that isn't there and yet adds something, a bias that is left out or multiplied.
    """
    inputs, count = values.shape
    tokens = -(-count // _WIDTH)
    values = nn.functional.pad(values, (0, tokens * _WIDTH - count))
    hidden = values.view(inputs, tokens, _WIDTH).transpose(0, 1).reshape(tokens, inputs * _WIDTH)
    experts = getattr(module, names_of(module).weights[0]).shape[0]
    both, factors = [0, experts - 1][:experts], [0.5, 0.25][:experts]

    def outputs(biased: bool, ids: list[int], factors: list[float]) -> torch.Tensor:
        index = torch.tensor([ids], dtype=torch.int64, device="cpu").repeat(tokens, 1)
        scores = torch.tensor([factors], dtype=torch.float64, device="cpu").repeat(tokens, 1)
        small = _small_copy(module, inputs, experts, biased)
        out: torch.Tensor = type(small).forward(small, hidden.clone(), index, scores)
        held = sum(factor for expert, factor in zip(ids, factors, strict=True) if expert < experts)
        return out.view(tokens, inputs, _WIDTH).transpose(0, 1).reshape(inputs, -1) / held

    found = {"the forward": outputs(False, both, factors)}
    with contextlib.suppress(Exception):  # a module that raises here is never given such an id
        found["the forward with an id beyond the last expert's"] = outputs(False, [0, experts], [0.5, 0.5])
    for what, halves in found.items():
        for own in halves:
            fault = _difference(own, values, activation)
            if fault is not None:
                return f"{what} {fault}"
    if not any(getattr(module, bias, None) is not None for bias in names_of(module).biases):
        return None
    moved = values + torch.tensor(_BIASES[:inputs], dtype=torch.float64, device="cpu")[:, None]
    for own in outputs(True, both, factors):
        fault = _difference(own, moved, activation, _BIASES[2])
        if fault is not None:
            return f"the forward with biases {fault}"
    return None


def _small_copy(module: Any, inputs: int, experts: int, biased: bool) -> Any:
    """The module with weights of ones and zeros in its own layout, H = inputs * I, and biases that are zeros or not."""
    names, layout = names_of(module), layout_of(module)
    eye = torch.eye(inputs * _WIDTH, dtype=torch.float64, device="cpu")
    ones = torch.ones(_WIDTH, dtype=torch.float64, device="cpu")
    first, second = eye, eye.view(-1, inputs, _WIDTH).sum(1)
    bias = torch.cat([number * ones for number in _BIASES[:inputs]])
    if layout.gate_up is GateUpRows.ALTERNATING:
        first, bias = (rows.view(2, _WIDTH, -1).transpose(0, 1).reshape(rows.shape) for rows in (first, bias))
    matrices = [matrix.T if layout.matrices is MatrixOrder.COLUMNS else matrix for matrix in (first, second)]
    tensors = dict(zip(names.weights, matrices, strict=True))
    down_bias = torch.full((inputs * _WIDTH,), _BIASES[2], dtype=torch.float64, device="cpu")
    for name, row in zip(names.biases, (bias, down_bias), strict=True):
        if module._parameters.get(name) is not None:
            tensors[name] = row if biased else torch.zeros_like(row)
    small = copy.copy(module)
    small.__dict__["_parameters"] = {
        **module._parameters,
        **{
            name: nn.Parameter(tensor.contiguous().expand(experts, *tensor.shape), requires_grad=False)
            for name, tensor in tensors.items()
        },
    }
    small.training = False
    if hasattr(module, "config"):
        small.config = copy.copy(module.config)
        small.config._experts_implementation_internal = "eager"  # the property would set those inside it, too
    return small
