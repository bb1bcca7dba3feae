"""What a layer's weights become once a server has loaded them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse.config import Activation, Path, WeightFormat
from epfuse.errors import ConfigError, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.policy import Checkpoint, LayerPlan, Storage
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.layouts import OURS, GateUpRows, WeightLayout


@dataclass(frozen=True)
class Parameters:
    """A layer's tensors as a server loaded them.

    Attributes:
        w13: ``[L, 2I, H]``.
        w2: ``[L, H, I]``.
        w13_scale: ``[L, 2I, H/32]`` E8M0 bytes; None of BF16 weights.
        w2_scale: ``[L, H, I/32]``.
        expert_map: ``[E]``; None where every expert is local.
        w13_bias: ``[L, 2I]``; None for none, as the next.
        w2_bias: ``[L, H]``.
        layout: how w13 and its bias lie, if not as said.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    expert_map: torch.Tensor | None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    layout: WeightLayout = OURS


@dataclass(frozen=True)
class LoadedLayer:
    """A layer ready for calls.

    Attributes:
        plan: how it is run.
        weights: in the plan's storage.
        expert_map: checked.
        activation: between the projections.
        seen: address of the map that the server hands to calls; a map made later was never checked.
    """

    plan: LayerPlan
    weights: ExpertWeights
    expert_map: ExpertMap
    activation: Activation
    seen: int | None

    def check_map(self, expert_map: torch.Tensor | None) -> None:
        """Refuse a map that is not the one that was checked.

        Args:
            expert_map: ``[E]``, as the server hands it over; None where every expert is local.

        Raises:
            ConfigError: experts have moved since the weights were loaded.
        """
        if address(expert_map) != self.seen:
            raise ConfigError(
                "the server hands over another expert map than after loading; experts that move while serving (EPLB,"
                " elastic EP) are not supported"
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that calls can take, whatever their token count."""
        return tuple({part.decision.path: None for part in self.plan.ranges})

    def path(self, tokens: int) -> Path:
        """What runs a call with ``tokens`` tokens."""
        return self.plan.at(tokens).path


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's memory begins."""
    return None if tensor is None else tensor.data_ptr()


def load_layer(plan: LayerPlan, parameters: Parameters, activation: Activation) -> LoadedLayer:
    """Bring the weights into the plan's storage; MXFP8 **in its own memory**, expert by expert.

    Dense weights in another layout are copied, and so are biases, which become float32. MXFP8 whose gate and up rows
    alternate is put in order where it lies.

    Args:
        plan: not untouched.
        parameters: the layer's.
        activation: between the projections.

    Raises:
        ConfigError, ExpertMapError, ShapeError, DtypeError: the tensors are not what the plan was made for.
    """
    _check_sizes(plan, parameters)
    experts = plan.request.shape.experts
    held = parameters.expert_map
    expert_map = ExpertMap.all_local(experts, parameters.w13.device) if held is None else ExpertMap(held)
    return LoadedLayer(plan, _weights(plan, parameters), expert_map, activation, address(held))


def _check_sizes(plan: LayerPlan, given: Parameters) -> None:
    """Refuse weights of another layer than the one that was planned: a server may pad what it allocates."""
    shape = plan.request.shape
    planned = {
        "w13": (shape.local_experts, 2 * shape.intermediate, shape.hidden),
        "w2": (shape.local_experts, shape.hidden, shape.intermediate),
    }
    for name, sizes in planned.items():
        found = tuple(getattr(given, name).shape)
        if found != sizes:
            raise ShapeError(f"{name} has shape {found}; the layer was planned with {sizes}")


def _weights(plan: LayerPlan, given: Parameters) -> ExpertWeights:
    if plan.request.checkpoint is Checkpoint.BF16:
        # contiguous: on ROCm vLLM pads the rows of dense weights (VLLM_ROCM_MOE_PADDING)
        dense = (given.w13.contiguous(), given.w2.contiguous())
        return ExpertWeights.dense(*dense, gate_up_bias=given.w13_bias, down_bias=given.w2_bias, layout=given.layout)
    if given.w13_scale is None or given.w2_scale is None:
        raise ConfigError("the plan is for MXFP8 weights, and the layer has no scales")
    if given.layout.gate_up is not GateUpRows.HALVES:
        for part in (given.w13, given.w13_scale):
            for expert in torch.split(part, 1):  # one by one: in_halves makes new memory
                expert.copy_(given.layout.in_halves(expert))
    gate_up_bias = None if given.w13_bias is None else given.layout.in_halves(given.w13_bias)
    mxfp8 = (given.w13, given.w13_scale, given.w2, given.w2_scale)
    made = ExpertWeights.mxfp8(*mxfp8) if plan.storage is Storage.MXFP8 else ExpertWeights.hybrid(*mxfp8)
    weights = ExpertWeights(made.formats, gate_up_bias, given.w2_bias)
    return weights.without(WeightFormat.MXFP8) if plan.storage is Storage.BF16 else weights.prepare(plan.request.target)
