"""fused_experts(): validate -> decide -> the steps of a family."""

from __future__ import annotations

import functools

import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler
from torch.profiler import record_function

from epfuse.arguments import member
from epfuse.compile_ops import traced_experts
from epfuse.config import ACTIVATIONS, Activation, Combine, LayerShape, Path, SwiGLUOAI
from epfuse.environment import environment
from epfuse.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.families.family import LayerCall
from epfuse.launch_plan import PLANS
from epfuse.operands import Span, require_apart, require_plain, span
from epfuse.policy.call import table_of
from epfuse.reference import run_reference
from epfuse.scratch import Scratch, check_scratch
from epfuse.stages.extent import ALIGNMENT, aligned
from epfuse.target import device_name, on_device, target_of
from epfuse.weights.experts import ExpertWeights

MINIMAX_M3 = SwiGLUOAI()
"""The activation of a call that names none."""
_shape = functools.lru_cache(maxsize=1024)(LayerShape)
"""The same object for the same sizes, checked once."""


def fused_experts(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    *,
    activation: Activation | None = None,
    path: Path = Path.AUTO,
    combine: Combine = Combine.DETERMINISTIC,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """One rank's routed experts: the sum, over the routes whose expert this rank holds, of the weighted outputs.

    The sum of the results over all ranks is the unsharded layer. Inference only: there is no backward, the result never
    requires grad (weights may, hidden may not), and torch.autocast changes nothing.

    Args:
        hidden: ``[T, H]`` contiguous; the dtype of dense weights; BF16 beside FP8 weights (on the reference path FP16
            and FP32 too).
        weights: this rank's experts.
        topk_weights: ``[T, K]`` float32 contiguous; a NaN reaches only its own token.
        topk_ids: ``[T, K]`` int32 or int64 contiguous, global expert ids; -1 and anything outside [0, E) is skipped.
        expert_map: which global experts are local, with L matching ``weights``.
        activation: between the two projections: `SwiGLUOAI`, `GELUTanh`, `SoftcappedSwiGLU`, or `ReLU2` beside weights
            without a gate; None means MiniMax-M3's.
        path: how to compute it; AUTO lets the policy choose (or EPFUSE_PATH, where it is set: `epfuse.environment`).
        combine: how a token's routes are summed. ATOMIC is for the paths with FP8 activations (W8A8, BLOCK_FP8) and not
            bitwise repeatable.
        out: ``[T, H]`` to write into, dtype and device of hidden; overlaps no other tensor of the call except
            ``scratch.y``. Allocated if None.
        scratch: memory for the rows between the stages, at least `epfuse.scratch_size` of it; they are allocated if
            None. The route table, and partial sums where programs share a tile's reduction, are always allocated. The
            reference path does not use it.

    Returns:
        ``[T, H]`` in hidden's dtype; zero for a token without a local route.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, ConfigError: an argument does not fit; the message names it.
            ConfigError also inside torch.jit.trace.
        UnsupportedTarget: the device can't run ``path`` on these weights, or not with this ``combine``.

    Host syncs: none on a GPU path; graph-capturable. `torch.compile` and `torch.export` trace it as one operator
    (`epfuse.compile_ops`).
    """
    activation = MINIMAX_M3 if activation is None else activation
    if torch.compiler.is_compiling():
        return traced_experts(hidden, weights, topk_weights, topk_ids, expert_map, activation, path, combine, out)
    if torch._C._is_tracing():
        raise ConfigError("torch.jit.trace records nothing that epfuse launches; use torch.export or torch.compile")
    check_call(hidden, weights, topk_weights, topk_ids, expert_map, activation, path, combine, out, scratch)
    tokens, top_k = topk_ids.shape
    read: list[tuple[str, Span]] = []
    if out is not None or scratch is not None:  # else all that is written is new
        tensors = {"hidden": hidden, "topk_weights": topk_weights, "topk_ids": topk_ids}
        tensors["expert_map"] = expert_map.on(hidden.device)
        read = [*((name, span(tensor)) for name, tensor in tensors.items()), *weights.spans()]
        if out is not None:
            require_apart("out", span(out), read)
    if out is None:
        out = torch.empty_like(hidden)
    if tokens == 0:
        return out
    if weights.local_experts == 0:
        with torch.inference_mode():  # out may be made in it, and then is written in it alone
            return out.zero_()
    shape = _shape(weights.hidden, weights.intermediate, expert_map.num_experts, weights.local_experts, top_k)
    kept, device = weights.kept, hidden.device
    asked = environment().path if path is Path.AUTO else path
    kind = (asked, target_of(device), shape, frozenset(kept), hidden.dtype, combine)  # a CallKind's fields, in order
    decision = table_of(*kind, type(activation), weights.bias, device_name(device)).at(tokens)
    if decision.family is None or decision.weights is None or decision.tiles is None:
        with torch.inference_mode():
            return out.copy_(run_reference(hidden, weights, topk_weights, topk_ids, expert_map, activation))
    if scratch is not None:
        size = decision.family.scratch(tokens, top_k, shape.hidden, shape.intermediate)
        check_scratch(scratch, size, hidden, out, read)
    experts, slots = kept[decision.weights], aligned(expert_map.on(device))
    result = out if out.data_ptr() % ALIGNMENT == 0 else torch.empty_like(out)
    call = LayerCall(
        aligned(hidden),
        experts.w13,
        experts.w2,
        aligned(topk_weights),
        aligned(topk_ids),
        slots,
        shape,
        activation,
        combine,
        result,
        scratch,
        weights.gate_up_bias,
        weights.down_bias,
    )
    # a range that nobody reads costs as much as a launch; the second asks for profilers of other threads
    watched = _profiler_enabled() or profiler._is_profiler_enabled
    with on_device(device):
        for name, launch in PLANS.steps(decision, call):
            if watched:
                with record_function(f"epfuse::{name}"):
                    launch()
            else:
                launch()
    if result is not out:
        with torch.inference_mode():  # out may be made in it, and then is written in it alone
            out.copy_(result)
    return out


def check_call(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: Activation,
    path: Path,
    combine: Combine,
    out: torch.Tensor | None,
    scratch: Scratch | None,
) -> None:
    """Raise the error that names the first argument that does not fit. Reads no tensor's data."""
    member("path", path, Path)
    member("combine", combine, Combine)
    for name, value, kind in (
        ("weights", weights, ExpertWeights),
        ("expert_map", expert_map, ExpertMap),
        ("activation", activation, Activation),
    ):
        if not isinstance(value, kind):
            hint = " (wrap a map tensor: ExpertMap(tensor))" if kind is ExpertMap else ""
            wanted = ", ".join(one.__name__ for one in (ACTIVATIONS if kind is Activation else (kind,)))
            raise ConfigError(f"{name} is a {type(value).__name__}; it must be an epfuse.{wanted}{hint}")
    if activation.inputs != weights.inputs:
        raise ShapeError(
            f"activation is {type(activation).__name__}, which wants w13 with {activation.inputs} * I rows; the weights"
            f" have {weights.inputs} * I ({'gate and up' if weights.inputs == 2 else 'no gate'})"
        )
    if scratch is not None and not isinstance(scratch, Scratch):
        raise ConfigError(f"scratch is a {type(scratch).__name__}; it must be an epfuse.Scratch")
    tensors = {"hidden": hidden, "topk_weights": topk_weights, "topk_ids": topk_ids}
    if out is not None:
        tensors["out"] = out
    device = weights.device
    for name, tensor in tensors.items():
        require_plain(name, tensor)
        if tensor.dim() != 2:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; it must have two dimensions")
        if tensor.device != device:
            raise DeviceError(f"{name} is on {tensor.device}; it must be on {device}, where the weights are")
        if not tensor.is_contiguous():
            raise LayoutError(f"{name} has strides {tensor.stride()}; it must be contiguous (call .contiguous())")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ConfigError(f"{name} requires grad; there is no backward: call fused_experts under torch.no_grad()")
    tokens, width = hidden.shape
    if width != weights.hidden:
        raise ShapeError(f"hidden has shape {(tokens, width)}; the weights need [T, H] with H={weights.hidden}")
    if hidden.dtype not in weights.activation_dtypes:
        raise DtypeError(
            f"hidden has dtype {hidden.dtype}; these weights need {' or '.join(map(str, weights.activation_dtypes))}"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be int32 or int64")
    if topk_weights.dtype != torch.float32:
        raise DtypeError(f"topk_weights has dtype {topk_weights.dtype}; it must be float32")
    if topk_ids.shape[0] != tokens:
        raise ShapeError(f"topk_ids has {topk_ids.shape[0]} rows; it must be [T, K] with T={tokens}, hidden's rows")
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            f"topk_weights has shape {tuple(topk_weights.shape)}; it must be topk_ids' shape {tuple(topk_ids.shape)}"
        )
    if topk_ids.shape[1] < 1:
        raise ShapeError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be [T, K] with K at least 1")
    if expert_map.num_local != weights.local_experts:
        raise ShapeError(
            f"expert_map has {expert_map.num_local} local experts; it must have the weights' L={weights.local_experts}"
        )
    if tokens * topk_ids.shape[1] >= 2**31:
        raise ShapeError(f"T*K is {tokens * topk_ids.shape[1]}; it must stay below 2**31")
    if out is None:
        return
    if out.shape != hidden.shape:
        raise ShapeError(f"out has shape {tuple(out.shape)}; it must be hidden's shape {tuple(hidden.shape)}")
    if out.dtype != hidden.dtype:
        raise DtypeError(f"out has dtype {out.dtype}; it must be hidden's dtype {hidden.dtype}")
