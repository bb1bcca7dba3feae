"""Test only: vLLM's MiniMax-M3 with plain PyTorch where it has no CPU kernel; importing this puts it in place."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

# The processor of images and videos needs torchvision, of which there is none for this torch on a CPU.
_pictures = ModuleType("vllm.transformers_utils.processors.minimax_m3")
_pictures.MIN_SHORT_SIDE_PIXEL = 0
for _name in ("MiniMaxM3VLImageProcessor", "MiniMaxM3VLVideoProcessor", "MiniMaxVLProcessor", "smart_resize"):
    setattr(_pictures, _name, type(_name, (), {}))
sys.modules.setdefault(_pictures.__name__, _pictures)

from vllm.models.minimax_m3.nvidia import model  # noqa: E402

MiniMaxM3SparseForCausalLM = model.MiniMaxM3SparseForCausalLM

_own_routing = CPURouter._compute_routing


def gemma_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm scaled by ``1 + weight``, in float32, over the last dimension."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (1 + weight.float())).to(x.dtype)


def _norm(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if residual is None:
        return gemma_norm(x, self.weight, self.variance_epsilon)
    total = x + residual
    return gemma_norm(total, self.weight, self.variance_epsilon), total


def _qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    rotary_dim: int,
    eps: float,
    **ignored: Any,
) -> None:
    """Norm every head of q and k, and rotate its first ``rotary_dim`` channels, half against half, in place."""
    head = q_weight.shape[0]
    cos, sin = (part.unsqueeze(1) for part in cos_sin[positions].float().chunk(2, dim=-1))  # [T, 1, rotary_dim/2]
    begin = 0
    for heads, weight in ((q_heads, q_weight), (kv_heads, k_weight)):
        part = qkv[:, begin : begin + heads * head]
        x = gemma_norm(part.reshape(-1, heads, head).float(), weight, eps)
        low, high = x[..., :rotary_dim].chunk(2, dim=-1)
        rotated = torch.cat([low * cos - high * sin, high * cos + low * sin, x[..., rotary_dim:]], dim=-1)
        part.copy_(rotated.reshape(part.shape))
        begin += heads * head


def _routing(self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
    if self.scoring_func != "sigmoid" or self.use_grouped_topk:
        return _own_routing(self, hidden_states, router_logits, *rest, **named)
    scores = router_logits.float().sigmoid()
    ids = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor
    return weights, ids.to(torch.int32)


model.MiniMAXGemmaRMSNorm.forward = _norm
model.ops.fused_minimax_m3_qknorm_rope_kv_insert = _qk_norm_rope
CPURouter._compute_routing = _routing
