"""A layer over all ranks: `torchrun --nproc-per-node 2 examples/expert_parallel.py` (any number, CPU or GPU)."""

import os

import torch
import torch.distributed as dist

from epfuse import ExpertMap, ExpertWeights, fused_experts
from epfuse.parallel.group import EPGroup
from epfuse.parallel.shard import shard_experts

gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
group = EPGroup.current()

torch.manual_seed(0)  # the same layer and the same tokens on every rank
T, K, H, I, E = 37, 4, 256, 128, 16
full_w13, full_w2 = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
hidden = torch.randn(T, H).to(device)
topk_weights, topk_ids = (tensor.to(device) for tensor in torch.rand(T, E).topk(K))


def experts(expert_map: ExpertMap) -> torch.Tensor:
    w13, w2 = (shard_experts(full, expert_map).to(device) for full in (full_w13, full_w2))
    return fused_experts(hidden, ExpertWeights.dense(w13, w2), topk_weights, topk_ids, expert_map)


own = group.expert_map(E, device)
y = group.all_reduce(experts(own))  # the layer's output, on every rank
torch.testing.assert_close(y, experts(ExpertMap.all_local(E, device)), rtol=1e-5, atol=1e-5)
print(f"rank {group.rank} of {group.size} holds {own.num_local} of {E} experts; the sum is the unsharded layer")
dist.destroy_process_group()
