"""vLLM's MiniMax-M3 class with the norms that vLLM has for AMD, in Triton; vLLM imports this by name."""

from __future__ import annotations

from typing import Any

from vllm.models.minimax_m3.amd.ops.gemma_rmsnorm import gemma_fused_add_rmsnorm, gemma_rmsnorm
from vllm.models.minimax_m3.nvidia import model


def _norm(self: Any, x: Any, residual: Any = None) -> Any:
    if residual is None:
        return gemma_rmsnorm(x, self.weight, self.variance_epsilon)
    return gemma_fused_add_rmsnorm(x, residual, self.weight, self.variance_epsilon)


model.MiniMAXGemmaRMSNorm.forward = _norm
MiniMaxM3SparseForCausalLM = model.MiniMaxM3SparseForCausalLM
