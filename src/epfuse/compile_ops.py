"""`fused_experts` as one operator of a graph: what `torch.compile` and `torch.export` see of a layer.

A tracer can't look into a layer: it launches kernels, and it chooses them by what the device is. So a traced call is
recorded as ``epfuse::fused_experts``, an operator of tensors and plain numbers, and runs as an ordinary call when the
graph runs. The weights and the map are taken apart into their tensors, which become inputs or constants of the graph
like any other weight: nothing is kept here, and a saved program needs ``import epfuse.compile_ops`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from epfuse.config import Activation, Combine, Path
from epfuse.errors import ConfigError, DtypeError, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.formats import FORMAT_OF


def traced_experts(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: Activation,
    path: Path,
    combine: Combine,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Record a call of `fused_experts`, whose arguments these are. The call's own checks come when the graph runs.

    A call's ``scratch`` is left out: the compiler plans memory itself. ``out`` is written by a copy, and a map that has
    no copy on ``hidden``'s device is copied there at each run: make it there.

    Raises:
        ConfigError: hidden or topk_weights requires grad, and gradients are on.
        ShapeError, DtypeError: out is not like hidden; a copy would hide it.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or topk_weights.requires_grad):
        raise ConfigError(
            "hidden or topk_weights requires grad; there is no backward: call the model under torch.no_grad()"
        )
    formats, tensors = take_apart(weights)
    slots = expert_map.nearest(hidden.device)
    result: torch.Tensor = _operator(
        hidden,
        tensors,
        formats,
        weights.local_experts,
        weights.intermediate,
        topk_weights,
        topk_ids,
        slots if slots.device == hidden.device else slots.to(hidden.device),
        activation.kind,
        list(activation.parameters),
        path.value,
        combine.value,
    )
    if out is None:
        return result
    if out.shape != hidden.shape:
        raise ShapeError(f"out has shape {tuple(out.shape)}; it must be hidden's shape {tuple(hidden.shape)}")
    if out.dtype != hidden.dtype:
        raise DtypeError(f"out has dtype {out.dtype}; it must be hidden's dtype {hidden.dtype}")
    return out.copy_(result)


def take_apart(weights: ExpertWeights) -> tuple[str, list[torch.Tensor]]:
    """The names of the formats that are kept and of the biases, joined by commas, and the tensors of each.

    A format's are w13's, then w2's.
    """
    names = [experts.form.value for experts in weights.formats] + [name for name, _ in weights.biases]
    kept = [part for experts in weights.formats for part in experts.tensors()]
    tensors = [tensor for _, tensor in (*kept, *weights.biases)]
    # a graph would carry their gradients to an operator that has none; the layer's result never requires one
    return ",".join(names), [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def put_together(formats: str, tensors: Sequence[torch.Tensor], hidden: int, intermediate: int) -> ExpertWeights:
    """The inverse of `take_apart`, on the same memory.

    Args:
        formats: names of `WeightFormat` and of biases, joined by commas.
        tensors: of each.
        hidden: H.
        intermediate: I.

    Raises:
        EpfuseError: they don't describe one layer.
    """
    rest, known = list(tensors), {form.value: form for form in FORMAT_OF}
    kept, biases = [], {}
    for name in formats.split(","):
        if name in _BIASES and rest:
            biases[name] = rest.pop(0)
            continue
        form = known.get(name)
        count = 0 if form is None else 2 * len(FORMAT_OF[form].parts(form, (1, 2, 1), torch.bfloat16))
        if form is None or len(rest) < count:
            raise ConfigError(
                f"formats has {name!r} with {len(rest)} tensors left; the graph was not made by this version of epfuse"
            )
        kept.append(FORMAT_OF[form].rebuilt(rest[:count], hidden, intermediate))
        del rest[:count]
    return ExpertWeights(tuple(kept), **biases)


_BIASES = ("gate_up_bias", "down_bias")


def _activation(kind: str, parameters: Sequence[float]) -> Activation:
    kinds: dict[str, Any] = {one.kind: one for one in Activation.__subclasses__()}
    if kind not in kinds:
        raise ConfigError(f"activation is {kind!r}; known are {', '.join(kinds)}: import the module that defines it")
    found: Activation = kinds[kind](*parameters)
    return found


@torch.library.custom_op(
    "epfuse::fused_experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor[] weights, str formats, int local_experts, int intermediate, Tensor topk_weights,"
    " Tensor topk_ids, Tensor slots, str activation, float[] parameters, str path, str combine) -> Tensor",
)
def _operator(
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    formats: str,
    local_experts: int,
    intermediate: int,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor,
    activation: str,
    parameters: Sequence[float],
    path: str,
    combine: str,
) -> torch.Tensor:
    from epfuse.api import fused_experts  # which imports this file

    return fused_experts(
        hidden,
        put_together(formats, weights, hidden.shape[1], intermediate),
        topk_weights,
        topk_ids,
        ExpertMap.of_checked(slots, local_experts),
        activation=_activation(activation, parameters),
        path=Path(path),
        combine=Combine(combine),
    )


@_operator.register_fake
def _(hidden: torch.Tensor, *operands: object) -> torch.Tensor:
    return torch.empty_like(hidden)
