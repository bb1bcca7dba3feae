"""Choose an activation, and check it against plain PyTorch: `python examples/activation.py`."""

import torch
from torch.nn.functional import silu

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI, fused_experts, silu_gate

torch.manual_seed(0)
T, K, H, I, E = 16, 2, 64, 48, 8
w13, w2 = torch.randn(E, 2 * I, H) / 4, torch.randn(E, H, I) / I**0.5
hidden = torch.randn(T, H)
topk_weights, topk_ids = torch.rand(T, E).topk(K)


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss's and MiniMax-M3's, with a smaller limit."""
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


CHOICES = {
    "silu(gate) * up": (silu_gate(), lambda gate, up: silu(gate) * up),
    "clamped SwiGLU": (SwiGLUOAI(alpha=1.702, beta=1.0, limit=2.0), clamped),
}
for name, (activation, plain) in CHOICES.items():
    y = fused_experts(
        hidden, ExpertWeights.dense(w13, w2), topk_weights, topk_ids, ExpertMap.all_local(E), activation=activation
    )
    gate, up = torch.einsum("th,tknh->tkn", hidden, w13[topk_ids]).chunk(2, -1)
    expected = torch.einsum("tki,tkhi,tk->th", plain(gate, up), w2[topk_ids], topk_weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    print(f"{name}: as in plain PyTorch, to {(y - expected).abs().max().item():.0e}")
