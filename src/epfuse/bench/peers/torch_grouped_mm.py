"""torch's grouped matrix product, with plain PyTorch around it: what can be had without a kernel of one's own."""

from __future__ import annotations

import torch

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import WeightFormat
from epfuse.errors import MissingDependency
from epfuse.stages.activation_reference import swiglu_oai

NAME = "torch grouped_mm"


def make(weights: LayerWeights) -> Contender:
    """Sort routes by expert, gather rows, multiply, activate, multiply, weight, add up.

    The host knows how many rows are local, as it does after an all-to-all: nothing is computed for the others.

    Raises:
        MissingDependency: this torch has no grouped product.
    """
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise MissingDependency(f"torch {torch.__version__} has no grouped_mm")
    experts = weights.dense
    w13, w2 = experts.w13.transpose(1, 2), experts.w2.transpose(1, 2)
    local, activation = weights.layer.shape.local_experts, weights.layer.activation

    def bind(inputs: Inputs) -> Call:
        slots, top_k = inputs.expert_map.on(inputs.hidden.device), inputs.topk_ids.shape[1]
        ends = torch.arange(local, device=inputs.hidden.device)

        def call() -> torch.Tensor:
            held = slots[inputs.topk_ids.flatten().long()].long()
            held = torch.where(held < 0, local, held)  # the others' routes come last
            expert, order = torch.sort(held, stable=True)
            route = order[: inputs.rows]
            offsets = torch.searchsorted(expert, ends, right=True).int()
            token = route // top_k
            gate_up = grouped_mm(inputs.hidden[token], w13, offs=offsets)
            y = grouped_mm(swiglu_oai(gate_up.float(), activation).to(gate_up.dtype), w2, offs=offsets)
            weighted = y.float() * inputs.topk_weights.flatten()[route, None]
            total = torch.zeros(inputs.hidden.shape, dtype=torch.float32, device=y.device)
            return total.index_add_(0, token, weighted).to(y.dtype)

        return call

    return Contender(
        name=NAME,
        kind=ContenderKind.PEER,
        weights="bf16",
        form=WeightFormat.DENSE,
        operand=MatrixOperand.BF16,
        tolerance=PEER_TOLERANCE,
        method=TimingMethod.GRAPH if weights.device.type == "cuda" else TimingMethod.PLAIN,
        bind=bind,
        note="plain PyTorch around torch's grouped product; the number of local rows is known to the host",
    )


CONTENDERS = {NAME: make}
