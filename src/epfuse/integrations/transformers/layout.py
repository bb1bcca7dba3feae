"""Which modules epfuse can compute, and take the place of: one set of rules for `register` and `replace_experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from epfuse.errors import DtypeError, LayoutError, ShapeError
from epfuse.integrations.transformers.experts import EPExperts
from epfuse.parallel.shard import check_whole
from epfuse.weights.dense import DENSE_DTYPES

WEIGHTS = ("gate_up_proj", "down_proj")
SCALES = ("gate_up_proj_scale_inv", "down_proj_scale_inv")
"""Beside FP8 weights: FP8Experts calls them so."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes routed experts, as far as its tensors say: both weights are tensors, not modules."""
    if isinstance(module, EPExperts):
        return False
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in WEIGHTS)


def check_layout(name: str, module: nn.Module) -> None:
    """Refuse experts whose weights epfuse would read wrongly, or that do more than their weights say.

    The flags are those that transformers' ``use_experts_implementation`` puts on a module; the shapes are checked too,
    for modules without them.

    Args:
        name: the module's, for errors.
        module: one that `is_experts` names.

    Raises:
        LayoutError: the weights are not [E, 2I, H] with two halves and [E, H, I], or aren't plain tensors, or there is
            something else that a module in its place would lose: biases, scales, hooks, an adapter.
        DtypeError: weights that are neither bfloat16, float16 nor float32.
        ShapeError: shapes of another kind.
    """
    where = f"{name} ({type(module).__name__})"
    for weight in WEIGHTS:
        if module._parameters.get(weight) is None:
            raise LayoutError(
                f"{where} has no parameter {weight} of its own (it is parametrized, compiled or wrapped); replace its"
                " experts first, and wrap afterwards"
            )
    for weight in WEIGHTS:
        tensor = module.get_parameter(weight)
        check_whole(f"{where}: {weight}", tensor)
        if tensor.dtype not in DENSE_DTYPES:
            raise DtypeError(
                f"{where}: {weight} has dtype {tensor.dtype}; it must be bfloat16, float16 or float32 (dequantise"
                " quantised experts first)"
            )
    _refuse(where, _misread(module, WEIGHTS) | _lost(name, module))
    _check_shapes(where, module)


def check_in_place(name: str, module: nn.Module) -> None:
    """Refuse experts that epfuse can't compute where they are, on the tensors that they have now.

    As `check_layout`, but hooks, a forward of its own and adapters stay in place; one rank's share of the experts is as
    good as all of them; and weights may be FP8 with scales.

    Args:
        name: the module's, for errors.
        module: any that transformers hands over.

    Raises:
        LayoutError, ShapeError: as `check_layout`.
    """
    where = f"{name} ({type(module).__name__})" if name else type(module).__name__
    quantised = all(isinstance(getattr(module, scale, None), torch.Tensor) for scale in SCALES)
    found = _misread(module, (*WEIGHTS, *SCALES) if quantised else WEIGHTS)
    static = getattr(module, "activation_scheme", "dynamic") == "static"
    _refuse(where, {"static scales of its activations": static} | found)
    for weight in WEIGHTS:
        if not isinstance(getattr(module, weight, None), torch.Tensor):
            raise LayoutError(f"{where} has no tensor {weight}")
        check_whole(f"{where}: {weight}", getattr(module, weight))
    _check_shapes(where, module)


def _refuse(where: str, refusals: dict[str, bool]) -> None:
    found = [what for what, present in refusals.items() if present]
    if found:
        raise LayoutError(
            f"{where} has {', '.join(found)}; epfuse needs gate_up_proj [E, 2I, H] with gate rows first, down_proj"
            " [E, H, I], and nothing else"
        )


def _check_shapes(where: str, module: nn.Module) -> None:
    gate_up, down = (getattr(module, weight) for weight in WEIGHTS)
    shapes = f"{where} has gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}"
    if gate_up.dim() != 3 or tuple(down.shape) != (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2):
        if torch.int8 in (gate_up.dtype, down.dtype):
            raise LayoutError(f"{shapes}, in int8: two FP4 numbers in a byte, which epfuse does not read")
        raise ShapeError(f"{shapes}; they must be [E, 2I, H] and [E, H, I]")
    if gate_up.shape[1] % 2 or 0 in gate_up.shape:
        raise ShapeError(f"{shapes}; E, I and H must be at least 1, and 2I even")


def _misread(module: Any, known: tuple[str, ...]) -> dict[str, bool]:
    """What would make epfuse's result another one -> whether the module has it."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    others = sorted(set(tensors).difference(known))
    biases = [other for other in others if other.endswith("bias")]
    return {
        "interleaved gate and up rows": not getattr(module, "is_concatenated", True),
        "transposed weights": getattr(module, "is_transposed", False),
        "no gate projection": not getattr(module, "has_gate", True),
        "a norm after the experts": getattr(module, "has_post_expert_norm", False),
        "biases": getattr(module, "has_bias", False) or bool(biases),
        f"other tensors ({', '.join(others)})": len(others) > len(biases),
    }


def _lost(name: str, module: Any) -> dict[str, bool]:
    """What a module in its place would lose -> whether the module has it."""
    hooks = [
        kind
        for kind in ("forward_pre", "forward", "backward_pre", "backward")
        if getattr(module, f"_{kind}_hooks", None)
    ]
    return {
        "weights that are one rank's share already (expert parallelism)": getattr(module, "_is_expert_parallel", False),
        "a forward of its own (tensor parallelism, offloading)": "forward" in vars(module),
        f"hooks ({', '.join(hooks)}), which would be lost: register them afterwards": bool(hooks),
        "an adapter around it (merge it first)": name.rpartition(".")[2] == "base_layer",
    }
