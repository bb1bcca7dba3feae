"""Which modules epfuse can compute, and take the place of: one set of rules for `register` and `replace_experts`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epfuse.errors import DtypeError, LayoutError, ShapeError
from epfuse.integrations.transformers.experts import EPExperts
from epfuse.parallel.shard import check_whole
from epfuse.weights.dense import DENSE_DTYPES
from epfuse.weights.layouts import GateUpRows, MatrixOrder, WeightLayout


@dataclass(frozen=True)
class Names:
    """What a module calls its tensors.

    Attributes:
        weights: of the first projection, ``gate_up_proj``, or ``up_proj`` where there is no gate; and of ``down_proj``.
    """

    weights: tuple[str, str]

    @property
    def biases(self) -> tuple[str, str]:
        """Of both projections, where they have biases."""
        first, second = self.weights
        return f"{first}_bias", f"{second}_bias"

    @property
    def scales(self) -> tuple[str, str]:
        """Beside FP8 weights: FP8Experts calls them so."""
        first, second = self.weights
        return f"{first}_scale_inv", f"{second}_scale_inv"

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """Weights, biases and scales."""
        return (*self.weights, *self.biases, *self.scales)


GATED = Names(("gate_up_proj", "down_proj"))
UNGATED = Names(("up_proj", "down_proj"))


def names_of(module: Any) -> Names:
    """By whether the module says that it has no gate."""
    return GATED if getattr(module, "has_gate", True) else UNGATED


def layout_of(module: Any) -> WeightLayout:
    """How a module stores its weights: the flags that transformers' ``use_experts_implementation`` puts on it."""
    return WeightLayout(
        GateUpRows.HALVES if getattr(module, "is_concatenated", True) else GateUpRows.ALTERNATING,
        MatrixOrder.COLUMNS if getattr(module, "is_transposed", False) else MatrixOrder.ROWS,
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes routed experts, as far as its tensors say: both weights are tensors, not modules."""
    if isinstance(module, EPExperts):
        return False
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in names_of(module).weights)


def check_layout(name: str, module: nn.Module) -> None:
    """Refuse experts whose weights epfuse would read wrongly, or that do more than their weights say.

    The flags are those that transformers' ``use_experts_implementation`` puts on a module; the shapes are checked too,
    for modules without them.

    Args:
        name: the module's, for errors.
        module: one that `is_experts` names.

    Raises:
        LayoutError: the weights aren't plain tensors, or there is something else that a module in its place would lose:
            scales, other tensors, hooks, an adapter.
        DtypeError: weights that are neither bfloat16, float16 nor float32.
        ShapeError: shapes of another kind.
    """
    where, names = f"{name} ({type(module).__name__})", names_of(module)
    for weight in names.weights:
        if module._parameters.get(weight) is None:
            raise LayoutError(
                f"{where} has no parameter {weight} of its own (it is parametrized, compiled or wrapped); replace its"
                " experts first, and wrap afterwards"
            )
    for weight in names.weights:
        tensor = module.get_parameter(weight)
        check_whole(f"{where}: {weight}", tensor)
        if tensor.dtype not in DENSE_DTYPES:
            raise DtypeError(
                f"{where}: {weight} has dtype {tensor.dtype}; it must be bfloat16, float16 or float32 (dequantise"
                " quantised experts first)"
            )
    _refuse(where, _misread(module, (*names.weights, *names.biases)) | _lost(name, module))
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
    names = names_of(module)
    quantised = all(isinstance(getattr(module, scale, None), torch.Tensor) for scale in names.scales)
    found = _misread(module, (*names.weights, *names.biases, *(names.scales if quantised else ())))
    static = getattr(module, "activation_scheme", "dynamic") == "static"
    _refuse(where, {"static scales of its activations": static} | found)
    for weight in names.weights:
        if not isinstance(getattr(module, weight, None), torch.Tensor):
            raise LayoutError(f"{where} has no tensor {weight}")
        check_whole(f"{where}: {weight}", getattr(module, weight))
    _check_shapes(where, module)


def _refuse(where: str, refusals: dict[str, bool]) -> None:
    found = [what for what, present in refusals.items() if present]
    if found:
        raise LayoutError(
            f"{where} has {', '.join(found)}; epfuse needs gate_up_proj [E, 2I, H] (or up_proj [E, I, H]) and down_proj"
            " [E, H, I], transposed and interleaved too, their biases, and nothing else"
        )


def _check_shapes(where: str, module: nn.Module) -> None:
    names, transposed = names_of(module), layout_of(module).matrices is MatrixOrder.COLUMNS
    first, second = (getattr(module, weight) for weight in names.weights)
    shapes = f"{where} has {names.weights[0]} {tuple(first.shape)} and down_proj {tuple(second.shape)}"
    inputs = 2 if names is GATED else 1
    wide = f"{inputs if inputs > 1 else ''}I"
    wanted = f"[E, H, {wide}] and [E, I, H]" if transposed else f"[E, {wide}, H] and [E, H, I]"
    experts, rows, hidden = (0, 0, 0) if first.dim() != 3 else first.mT.shape if transposed else first.shape
    down = second.mT if transposed and second.dim() == 3 else second
    if first.dim() != 3 or tuple(down.shape) != (experts, hidden, rows // inputs):
        if torch.int8 in (first.dtype, second.dtype):
            raise LayoutError(f"{shapes}, in int8: two FP4 numbers in a byte, which epfuse does not read")
        raise ShapeError(f"{shapes}; they must be {wanted}")
    if rows % inputs or 0 in first.shape:
        raise ShapeError(f"{shapes}; E, I and H must be at least 1, and 2I even")
    for name, outputs in zip(names.biases, (rows, hidden), strict=True):
        bias = getattr(module, name, None)
        if bias is not None and tuple(bias.shape) != (experts, outputs):
            raise ShapeError(f"{where} has {name} {tuple(bias.shape)}; it must be {(experts, outputs)}")


def _misread(module: Any, known: tuple[str, ...]) -> dict[str, bool]:
    """What would make epfuse's result another one -> whether the module has it."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    others = sorted(set(tensors).difference(known))
    missing = getattr(module, "has_bias", False) and not all(name in tensors for name in names_of(module).biases)
    return {
        "a norm after the experts": getattr(module, "has_post_expert_norm", False),
        "biases that are no tensors of its own": missing,
        f"other tensors ({', '.join(others)})": bool(others),
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
