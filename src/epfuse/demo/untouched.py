"""The untouched model: what the expert-parallel one must reproduce, and how far rounding alone moves it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from epfuse.api import fused_experts
from epfuse.config import SwiGLUOAI
from epfuse.expert_map import ExpertMap
from epfuse.integrations.transformers import activation_of
from epfuse.stages.route.reference import route
from epfuse.weights.experts import ExpertWeights

# Two correct float32 programs differ by some 1e-7 in a router's score. Where the last chosen expert leads the first
# rejected one by less than this, they may route differently, and nothing after that token is comparable.
ROUTING_TIE = 2e-6


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's experts in the untouched model's run over the prompt.

    Attributes:
        hidden: ``[T, H]`` input.
        topk_ids: ``[T, K]`` int64.
        topk_weights: ``[T, K]`` float32.
        exact: ``[T, H]`` float64, transformers' own experts module in float64 on that input.
        unsharded: ``[T, H]``, fused_experts with all experts on one rank.
        transformers_error: max abs distance of transformers' output in the demo's dtype from ``exact``.
        clamped: share of gate and up values that the activation's limit cuts.
    """

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    exact: torch.Tensor
    unsharded: torch.Tensor
    transformers_error: float
    clamped: float


@dataclass(frozen=True)
class Untouched:
    """The untouched model's run.

    Attributes:
        prompt: ``[T]`` int64.
        logits: ``[T, V]`` in the demo's dtype.
        tokens: greedy continuation.
        logits_noise: RMS distance of ``logits`` from the same model's in float64, which is rounding and nothing else.
        logits_scale: RMS of ``logits``.
        layers: experts module name -> trace, in model order.
    """

    prompt: torch.Tensor
    logits: torch.Tensor
    tokens: list[int]
    logits_noise: float
    logits_scale: float
    layers: dict[str, LayerTrace]


@torch.no_grad()
def run_untouched(model: Any, prompt: torch.Tensor, new_tokens: int) -> Untouched:
    """Run the model as transformers has it.

    Args:
        model: a MiniMaxM3VLForCausalLM.
        prompt: ``[T]`` int64 on the model's device; in float32 it is cut before the first routing tie.
        new_tokens: greedy tokens to generate.
    """
    exact_model = copy.deepcopy(model).double()
    margins: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(partial(_note_margin, margins))
        for name, module in exact_model.named_modules()
        if name.endswith("mlp.gate")
    ]
    exact_logits = exact_model(prompt[None]).logits[0]
    for hook in hooks:
        hook.remove()
    if model.dtype == torch.float32:
        prompt = prompt[: comparable_tokens(torch.stack(margins).amin(0))]
    experts = {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}
    calls: dict[str, tuple[torch.Tensor, ...]] = {}
    hooks = [module.register_forward_hook(partial(_note_call, calls, name)) for name, module in experts.items()]
    logits = model(prompt[None]).logits[0]
    for hook in hooks:
        hook.remove()
    layers = {
        name: _trace(name, module, exact_model.get_submodule(name), calls[name]) for name, module in experts.items()
    }
    tokens = greedy(model, prompt, new_tokens)
    noise = rms(logits.double() - exact_logits[: prompt.numel()])
    return Untouched(prompt, logits, tokens, noise, rms(logits.double()), layers)


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation of ``prompt`` ``[T]`` through the model's own ``generate`` and cache."""
    ids = prompt[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return [int(token) for token in out[0, prompt.numel() :]]


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def max_abs(values: torch.Tensor) -> float:
    """Largest magnitude; NaN if there is one."""
    return float(values.abs().max())


def comparable_tokens(margins: torch.Tensor) -> int:
    """Tokens before the first one that some layer routes by a tie; at least one.

    Args:
        margins: ``[T]``, the smallest lead of a chosen expert's score over a rejected one's in any layer.
    """
    ties = (margins < ROUTING_TIE).nonzero()
    return max(1, int(ties[0])) if ties.numel() else margins.numel()


def save_untouched(run: Untouched, path: Path) -> None:
    """Write the tensors that the ranks compare with to a safetensors file."""
    tensors = {"prompt": run.prompt, "logits": run.logits}
    for name, layer in run.layers.items():
        for field in ("hidden", "topk_ids", "topk_weights", "exact", "unsharded"):
            tensors[f"{name}/{field}"] = getattr(layer, field)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def load_tensor(path: Path, name: str, device: torch.device) -> torch.Tensor:
    """One tensor of `save_untouched`: ``prompt``, ``logits``, or ``<module>/<field of LayerTrace>``."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.to(device)


def _note_margin(margins: list[torch.Tensor], module: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
    scores = torch.sigmoid(output[0]) + module.e_score_correction_bias
    best = scores.topk(module.top_k + 1, dim=-1).values
    margins.append(best[:, -2] - best[:, -1])


def _note_call(
    calls: dict[str, tuple[torch.Tensor, ...]], name: str, _module: Any, args: tuple[torch.Tensor, ...], output: Any
) -> None:
    calls[name] = (*args, output)


def _trace(name: str, module: Any, exact_module: nn.Module, call: tuple[torch.Tensor, ...]) -> LayerTrace:
    hidden, ids, weights, output = call
    exact = exact_module(hidden.double(), ids, weights.double())
    everything = ExpertMap.all_local(module.num_experts, hidden.device)
    dense = ExpertWeights.dense(module.gate_up_proj.data, module.down_proj.data)
    activation = activation_of(name, module)
    assert isinstance(activation, SwiGLUOAI)  # MiniMax-M3's
    unsharded = fused_experts(hidden, dense, weights.float(), ids, everything, activation=activation)
    table = route(ids, everything.on(hidden.device), module.num_experts, block_m=1)
    cut = total = 0
    for expert, routes in table.groups():
        gate, up = (hidden[routes // ids.shape[1]] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        cut += int((gate > activation.limit).sum() + (up.abs() > activation.limit).sum())
        total += gate.numel() + up.numel()
    error = max_abs(output.double() - exact)
    return LayerTrace(hidden, ids, weights.float(), exact, unsharded, error, cut / total)
