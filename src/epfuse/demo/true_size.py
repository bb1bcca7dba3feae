"""One rank's MoE layer at MiniMax-M3's true size, on a GPU."""

from __future__ import annotations

import time

import torch

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums
from epfuse.config import MINIMAX_M3_EP8, Path, SwiGLUOAI, WeightFormat
from epfuse.demo.record import TrueSizeRecord
from epfuse.demo.untouched import max_abs
from epfuse.expert_map import ExpertMap
from epfuse.reference import run_reference
from epfuse.stages.route.reference import local_experts
from epfuse.weights.experts import ExpertWeights

TOKENS = 16
RANKS = 8
RANK = 3


@torch.no_grad()
@checks_enums
def run_true_size(device: torch.device, seed: int, form: WeightFormat = WeightFormat.DENSE) -> TrueSizeRecord:
    """H=6144, I=3072, 16 of 128 experts in BF16 or MXFP8: the kernels' path against the reference in float64.

    Args:
        device: a GPU with some 5 GB free (1.8 GB of weights; the reference converts one expert at a time).
        seed: of weights, activations and routing.
        form: DENSE for BF16 weights, MXFP8 for these weights quantised and prepared for the device.
    """
    shape = MINIMAX_M3_EP8
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16) * scale

    weights = ExpertWeights.bf16(
        normal(shape.local_experts, 2 * shape.intermediate, shape.hidden, scale=3.0 * shape.hidden**-0.5),
        normal(shape.local_experts, shape.hidden, shape.intermediate, scale=0.5 * shape.intermediate**-0.5),
    )
    path = Path.BF16
    if form is WeightFormat.MXFP8:
        weights, path = ExpertWeights.quantize(weights).prepare(), Path.W8A16
    hidden = normal(TOKENS, shape.hidden, scale=1.0)
    scores = torch.rand(TOKENS, shape.experts, generator=generator, device=device)
    chosen = scores.topk(shape.top_k)
    topk_weights = chosen.values / chosen.values.sum(-1, keepdim=True)
    expert_map = ExpertMap.contiguous(shape.experts, RANKS, RANK, device)
    activation = SwiGLUOAI()
    call = (hidden, weights, topk_weights, chosen.indices, expert_map)

    got = fused_experts(*call, activation=activation, path=path)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    fused_experts(*call, activation=activation, path=path, out=got)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start

    exact = run_reference(*call, activation, compute=torch.float64)
    return TrueSizeRecord(
        device=torch.cuda.get_device_name(device),
        tokens=TOKENS,
        local_routes=int((local_experts(chosen.indices, expert_map.on(device)) >= 0).sum()),
        path=path.value,
        error=max_abs(got.double() - exact),
        scale=max_abs(exact),
        seconds=seconds,
    )
