"""One rank's experts, in BF16 and in MXFP8: `python examples/layer.py`."""

import torch

from epfuse import ExpertMap, ExpertWeights, SwiGLUOAI, fused_experts

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
T, K, H, I, E, L = 37, 4, 256, 128, 16, 4  # this rank holds 4 of 16 experts
w13 = torch.randn(L, 2 * I, H, device=device, dtype=torch.bfloat16) / H**0.5  # gate rows, then up rows
w2 = torch.randn(L, H, I, device=device, dtype=torch.bfloat16) / I**0.5
hidden = torch.randn(T, H, device=device, dtype=torch.bfloat16)
topk_weights, topk_ids = torch.rand(T, E, device=device).topk(K)  # the router's choice: global expert ids

expert_map = ExpertMap.contiguous(num_experts=E, ep_size=4, ep_rank=3, device=device)  # experts 12 to 15
call = (topk_weights, topk_ids, expert_map)
weights = ExpertWeights.bf16(w13, w2)
y = fused_experts(hidden, weights, *call, activation=SwiGLUOAI(limit=7.0))

# A checkpoint's own MXFP8 tensors go into ExpertWeights.mxfp8(w13, w13_scale, w2, w2_scale).
small = ExpertWeights.quantize(weights).prepare()  # in the order that this GPU reads fastest
y8 = fused_experts(hidden, small, *call, activation=SwiGLUOAI(limit=7.0))

routed = ((topk_ids >= 12) & (topk_ids < 16)).any(1)  # other tokens have no expert here: their rows are zeros
assert not y[~routed].any()
error = ((y8 - y).float().norm() / y.float().norm()).item()
print(f"{int(routed.sum())} of {T} tokens have an expert on this rank; MXFP8 changes their rows by {error:.1%}")
