"""PyTorch in place of the compiled operators that vLLM's TritonExperts calls between its Triton kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.experts import triton_moe

from epfuse.config import SwiGLUOAI
from epfuse.stages.activation_reference import swiglu_oai


def align(topk_ids, config, num_tokens, top_k, experts, expert_map, **_):
    """Routes grouped by expert and padded; blocks of remote experts and of padding rows are marked -1."""
    block = config["BLOCK_SIZE_M"]
    flat, routes = topk_ids.flatten(), topk_ids.numel()
    order, owners = [], []
    for expert in [*range(experts), -1]:
        mine = (flat == expert).nonzero().flatten().tolist()
        blocks = -(-len(mine) // block)
        order += mine + [routes] * (blocks * block - len(mine))
        slot = -1 if expert < 0 else expert if expert_map is None else int(expert_map[expert])
        owners += [slot] * blocks
    as_int = {"dtype": torch.int32, "device": topk_ids.device}
    return torch.tensor(order, **as_int), torch.tensor(owners, **as_int), torch.tensor([len(order)], **as_int)


def give(experts: Any, activation: SwiGLUOAI | None, monkeypatch) -> None:
    """Let one of vLLM's experts objects run without its compiled operators; its own activation is not one if None."""

    def activate(_, output, gate_up, **__):
        output.copy_(swiglu_oai(gate_up.float(), activation))

    def moe_sum(rows, output, *_, **__):
        output.copy_(rows.float().sum(1))

    monkeypatch.setattr(triton_moe, "_prepare_expert_assignment", align)
    if activation is not None:
        monkeypatch.setattr(experts, "activation", activate)
    monkeypatch.setattr(experts, "moe_sum", moe_sum)


def give_gpt_oss(experts: Any, monkeypatch) -> None:
    """As `give`, with the activation whose gate and up rows alternate, as vLLM's own PyTorch code computes it."""
    fixed = SimpleNamespace(alpha=1.702, limit=7.0)  # what vLLM's model leaves to the operator's defaults

    def activate(_, output, both, **__):
        output.copy_(SwigluOAIAndMul.forward_native(fixed, both.float()))

    give(experts, None, monkeypatch)
    monkeypatch.setattr(experts, "activation", activate)
