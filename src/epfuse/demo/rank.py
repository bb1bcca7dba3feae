"""What each rank of the demo does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epfuse.demo.model import build_model
from epfuse.demo.padding import local_rows
from epfuse.demo.progress import StepFile
from epfuse.demo.record import RankLayer, RankRecord
from epfuse.demo.settings import DemoSettings
from epfuse.demo.untouched import greedy, load_tensor, max_abs, rms
from epfuse.integrations.transformers import EPExperts, replace_experts
from epfuse.parallel.launch import RankContext
from epfuse.weights.checkpoint import load_sharded


@dataclass(frozen=True)
class RankJob:
    """What the launcher tells every rank.

    Attributes:
        settings: the run's.
        block_m: rows of a block that the padding is counted in.
        checkpoint: safetensors file of the untouched model.
        untouched: safetensors file of `save_untouched`.
        step_dir: folder for the rank's `StepFile`.
    """

    settings: DemoSettings
    block_m: int
    checkpoint: Path
    untouched: Path
    step_dir: Path


RANK_STEPS = 4
"""Steps that a rank reports: model loaded, prompt read, layers compared, tokens generated."""


@torch.no_grad()
def run_rank(context: RankContext, job: RankJob) -> RankRecord:
    """Load this rank's shard of the model, run it beside the other ranks and compare with the untouched one."""
    start = time.perf_counter()
    steps = StepFile(job.step_dir, context.group.rank)
    read = partial(load_tensor, job.untouched, device=context.device)

    model: Any = build_model(job.settings.size, job.settings.torch_dtype, "meta")
    replacement = replace_experts(model, context.group, form=job.settings.weights)
    load_sharded(model, job.checkpoint, replacement.sharded_parameters, context.device)
    steps.done()

    prompt = read(name="prompt")
    for experts in replacement.experts.values():
        experts.prepare()
    routed: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(partial(_note_routes, routed, name))
        for name, module in replacement.experts.items()
    ]
    logits = model(prompt[None]).logits[0]
    for hook in hooks:
        hook.remove()
    difference = logits.double() - read(name="logits").double()
    steps.done()

    layers = {}
    for name, experts in replacement.experts.items():
        useful, padded = local_rows(routed[name], experts.expert_map, job.block_m)
        total = experts(read(name=f"{name}/hidden"), read(name=f"{name}/topk_ids"), read(name=f"{name}/topk_weights"))
        error = max_abs(total.double() - read(name=f"{name}/exact"))
        distance = max_abs(total.double() - read(name=f"{name}/unsharded").double())
        layers[name] = RankLayer(useful, padded, error, distance)
    steps.done()

    tokens = greedy(model, prompt, job.settings.new_tokens)
    steps.done()
    held = sum(w.nbytes for module in replacement.experts.values() for w in module.parameters())
    return RankRecord(
        rank=context.group.rank,
        device=str(context.device),
        layers=layers,
        logits_rms=rms(difference),
        logits_max=max_abs(difference),
        tokens=tokens,
        expert_bytes=held,
        seconds=time.perf_counter() - start,
    )


def _note_routes(
    routed: dict[str, torch.Tensor], name: str, _module: EPExperts, args: tuple[torch.Tensor, ...]
) -> None:
    routed[name] = args[1]
