"""A real call, on the GPU or the CPU's family, compared with the reference in float64."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from epfuse.doctor.finding import Answer, bad, good
from epfuse.doctor.gpu import this_device

if TYPE_CHECKING:
    import torch

    from epfuse.config import Path

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS, RANKS = 37, 4, 256, 128, 16, 4
"""T, K, H, I, E and P of the call: no multiple of a block's rows, and small enough for any machine."""


def call() -> Answer:
    """One rank's experts, in BF16 and in MXFP8, within the budget that ``epfuse verify`` has."""
    import torch

    from epfuse.config import Path
    from epfuse.families.registry import READABLE
    from epfuse.target import target_of

    device = this_device()
    where = "on the GPU" if device.type == "cuda" else "on the CPU's family, as there is no GPU"
    start = time.monotonic()
    torch.manual_seed(0)
    figures = {path: run(path, device) for path in (Path.BF16, Path.W8A16) if path in READABLE[target_of(device)]}
    seconds = time.monotonic() - start
    words = ", ".join(f"{path.value} {snr:.0f} dB (at least {least:.0f})" for path, (snr, least, _) in figures.items())
    words = f"{where}, beside float64: {words}, in {seconds:.1f} s"
    if all(within for _, _, within in figures.values()):
        return good(words)
    return bad(
        f"wrong results {words}", "don't serve with it; 'epfuse verify --json' says more: report a bug with its output"
    )


def run(path: Path, device: torch.device) -> tuple[float, float, bool]:
    """One call.

    Args:
        path: BF16 or W8A16.
        device: where.

    Returns:
        The worst token's signal-to-noise ratio in decibels, the least that is right, and whether all figures are.
    """
    import torch

    from epfuse import ExpertMap, ExpertWeights, fused_experts
    from epfuse.api import MINIMAX_M3
    from epfuse.config import Path
    from epfuse.reference import run_reference
    from epfuse.verify.budget import compare, dense_tolerance

    local = EXPERTS // RANKS
    w13 = torch.randn(local, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    w2 = torch.randn(local, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().to(device)
    topk_weights, topk_ids = (tensor.to(device) for tensor in torch.rand(TOKENS, EXPERTS).topk(TOP_K))
    weights = ExpertWeights.bf16(w13.bfloat16().to(device), w2.bfloat16().to(device))
    if path is not Path.BF16:
        weights = ExpertWeights.quantize(weights)
    expert_map = ExpertMap.contiguous(EXPERTS, RANKS, RANKS - 1, device)
    expected = run_reference(hidden, weights, topk_weights, topk_ids, expert_map, MINIMAX_M3, torch.float64)
    out = torch.full_like(hidden, torch.nan)  # what is not written is seen
    ready = weights.prepare(path=path)
    fused_experts(hidden, ready, topk_weights, topk_ids, expert_map, path=path, out=out)
    budget = dense_tolerance(torch.bfloat16, HIDDEN, INTERMEDIATE)
    difference = compare(out, expected)
    return difference.snr_db, budget.snr_db, difference.within(budget)
