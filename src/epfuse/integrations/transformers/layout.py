"""What a module must be for epfuse to take its weights and stand in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from epfuse.errors import DtypeError, LayoutError, ShapeError
from epfuse.integrations.transformers.experts import EPExperts
from epfuse.parallel.shard import check_whole
from epfuse.weights.dense import DENSE_DTYPES

WEIGHTS = ("gate_up_proj", "down_proj")


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
        check_whole(f"{where}: {weight}", module.get_parameter(weight))
    gate_up, down = (module.get_parameter(weight) for weight in WEIGHTS)
    for weight, tensor in zip(WEIGHTS, (gate_up, down), strict=True):
        if tensor.dtype not in DENSE_DTYPES:
            raise DtypeError(
                f"{where}: {weight} has dtype {tensor.dtype}; it must be bfloat16, float16 or float32 (dequantise"
                " quantised experts first)"
            )
    found = [what for what, present in _refusals(name, module).items() if present]
    if found:
        raise LayoutError(
            f"{where} has {', '.join(found)}; epfuse needs gate_up_proj [E, 2I, H] with gate rows first, down_proj"
            " [E, H, I], and nothing else"
        )
    shapes = f"{where} has gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}"
    if gate_up.dim() != 3 or tuple(down.shape) != (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2):
        raise ShapeError(f"{shapes}; they must be [E, 2I, H] and [E, H, I]")
    if gate_up.shape[1] % 2 or 0 in gate_up.shape:
        raise ShapeError(f"{shapes}; E, I and H must be at least 1, and 2I even")


def _refusals(name: str, module: Any) -> dict[str, bool]:
    """What epfuse can't take -> whether the module has it."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    others = sorted(set(tensors).difference(WEIGHTS))
    biases = [other for other in others if other.endswith("bias")]
    hooks = [
        kind
        for kind in ("forward_pre", "forward", "backward_pre", "backward")
        if getattr(module, f"_{kind}_hooks", None)
    ]
    return {
        "interleaved gate and up rows": not getattr(module, "is_concatenated", True),
        "transposed weights": getattr(module, "is_transposed", False),
        "no gate projection": not getattr(module, "has_gate", True),
        "a norm after the experts": getattr(module, "has_post_expert_norm", False),
        "biases": getattr(module, "has_bias", False) or bool(biases),
        f"other tensors ({', '.join(others)})": len(others) > len(biases),
        "weights that are one rank's share already (expert parallelism)": getattr(module, "_is_expert_parallel", False),
        "a forward of its own (tensor parallelism, offloading)": "forward" in vars(module),
        f"hooks ({', '.join(hooks)}), which would be lost: register them afterwards": bool(hooks),
        "an adapter around it (merge it first)": name.rpartition(".")[2] == "base_layer",
    }
