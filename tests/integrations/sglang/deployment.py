"""Layers of SGLang's own classes, built on a CPU as one rank of a deployment would build them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_flags, get_parallel, get_server_args

from epfuse.integrations.sglang import facts, hooks, rules
from epfuse.numerics.mxfp8 import decode, encode
from epfuse.target import Target

MXFP8_CONFIG = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 64, 192, 2
ALPHA, LIMIT = 1.702, 7.0
SWIGLU_OAI = {"gemm1_alpha": ALPHA, "gemm1_beta": 1.0, "gemm1_clamp_limit": LIMIT, "gate_up_interleaved": False}


@dataclass(frozen=True)
class Deployment:
    """One rank's place, and what the layer is built with.

    Attributes:
        target: what the GPU is taken for.
        quantized: whether the checkpoint is MXFP8.
        ep: ranks that the experts are spread over.
        tp: ranks that I is split over.
        rank: this one.
        server: server arguments.
        layer: further arguments of FusedMoE.
        chosen: the MoE runner that SGLang makes of the user's ``auto``; None for the same.
        sizes: experts, H, I and top-k.
        stages: of a pipeline, each of which has ``ep * tp`` ranks.
    """

    target: Target | None = Target.CPU
    quantized: bool = True
    ep: int = 1
    tp: int = 1
    rank: int = 0
    server: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=lambda: dict(SWIGLU_OAI))
    chosen: str | None = None
    sizes: tuple[int, int, int, int] = (EXPERTS, HIDDEN, INTERMEDIATE, TOP_K)
    stages: int = 1

    @contextmanager
    def entered(self, monkeypatch: Any) -> Iterator[None]:
        """SGLang's process-wide state of that rank."""
        for module in (facts, hooks):
            monkeypatch.setattr(module, "target_here", lambda: self.target)
        asked = resolve_moe_runner_backend(self.chosen or self.server.get("moe_runner_backend", "auto"))
        monkeypatch.setattr(get_flags().moe, "runner_backend", asked)
        size = self.ep * self.tp
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with (
                get_context().override_server_args(**self.server),
                get_parallel().override(
                    tp_size=size,
                    pp_size=self.stages,
                    attn_tp_size=size // self.server.get("attn_dp_size", 1),
                    tp_group=SimpleNamespace(world_size=size),
                    moe_ep_size=self.ep,
                    moe_ep_rank=self.rank // self.tp,
                    moe_tp_size=self.tp,
                    moe_tp_rank=self.rank % self.tp,
                ),
            ):
                arguments, name = get_server_args(), "moe_runner_backend"
                # the record is the user's words; what `override_server_args` gets counts as resolved
                msgspec.Struct.__setattr__(arguments, name, self.server.get(name, "auto"))
                if self.chosen is not None:
                    arguments._resolved_overrides.append(("its model", {name: self.chosen}))
                yield
        finally:
            torch.set_default_dtype(before)

    def build(self) -> FusedMoE:
        """The layer, without weights; within `entered`."""
        config = Fp8Config.from_config(MXFP8_CONFIG) if self.quantized else None
        experts, hidden, intermediate, top_k = self.sizes
        return FusedMoE(
            experts,
            hidden,
            intermediate,
            3,
            top_k=top_k,
            quant_config=config,
            prefix="model.layers.3.mlp.experts",
            **self.layer,
        )


@contextmanager
def installed() -> Iterator[None]:
    """The plugin's hooks on SGLang, as `load_plugins` leaves them, and gone afterwards."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.layers.moe.moe_runner import runner
    from sglang.srt.layers.quantization import fp8, unquant
    from sglang.srt.model_executor.model_runner_components import weight_updater

    owners = (fp8.Fp8Config, fp8.Fp8MoEMethod, unquant.UnquantizedFusedMoEMethod, weight_updater)
    saved = [(owner, dict(vars(owner))) for owner in owners]
    hooks.install()
    HookRegistry.apply_hooks()
    try:
        yield
    finally:
        HookRegistry.reset()
        for owner, names in saved:
            for name, value in names.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
        runner._CUSTOM_RUNNER_CORE_FACTORIES.pop(rules.NAME)
        utils._REGISTERED_MOE_RUNNER_BACKEND_NAMES.discard(rules.NAME)
        for choices in (hooks.MOE_RUNNER_BACKEND_CHOICES, hooks.MXFP8_MOE_RUNNER_BACKEND_CHOICES):
            choices.remove(rules.NAME)
        hooks._said.clear()


def checkpoint(seed: int = 0, quantized: bool = True) -> dict[tuple[str, int], Any]:
    """``(shard, expert)`` -> BF16 ``[N, K]``, or MXFP8 values and scales."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for expert in range(EXPERTS):
        for shard, rows, columns in (
            ("w1", INTERMEDIATE, HIDDEN),
            ("w2", HIDDEN, INTERMEDIATE),
            ("w3", INTERMEDIATE, HIDDEN),
        ):
            dense = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
            found[shard, expert] = encode(dense) if quantized else dense
    return found


def load(layer: FusedMoE, weights: dict[tuple[str, int], Any]) -> None:
    """Through the layer's own loaders, under a checkpoint's names, every expert as if this rank had read it."""
    for (shard, expert), given in weights.items():
        stem = "w2" if shard == "w2" else "w13"
        tensors = given if isinstance(given, tuple) else (given,)
        names = (f"{stem}_weight", f"{stem}_weight_scale_inv")
        for name, suffix, tensor in zip(names, ("weight", "weight_scale_inv"), tensors, strict=False):
            parameter = getattr(layer, name)
            parameter.weight_loader(
                parameter, tensor, f"model.layers.3.mlp.experts.{expert}.{shard}.{suffix}", shard_id=shard,
                expert_id=expert,
            )  # fmt: skip


def routes(tokens: int, seed: int = 0) -> tuple[torch.Tensor, StandardTopKOutput]:
    """Hidden states ``[T, H]``, and a router's choice with global ids."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, HIDDEN, generator=generator) * 4).bfloat16()
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    weights, ids = logits.float().softmax(-1).topk(TOP_K)
    return hidden, StandardTopKOutput(weights.float(), ids.int(), logits)


def expected(
    weights: dict[tuple[str, int], Any], hidden: torch.Tensor, topk: StandardTopKOutput, silu: bool = False
) -> torch.Tensor:
    """The whole layer in float64, written from the formulas: ``[T, H]``."""

    def matrix(shard: str, expert: int) -> torch.Tensor:
        given = weights[shard, expert]
        return decode(*given, torch.float64) if isinstance(given, tuple) else given.double()

    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, (ids, scales) in enumerate(zip(topk.topk_ids.tolist(), topk.topk_weights.tolist(), strict=True)):
        for expert, scale in zip(ids, scales, strict=True):
            x = hidden[token].double()
            gate, up = matrix("w1", expert) @ x, matrix("w3", expert) @ x
            if silu:
                y = gate * torch.sigmoid(gate) * up
            else:
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                y = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
            result[token] += scale * (matrix("w2", expert) @ y)
    return result


def close(result: torch.Tensor, truth: torch.Tensor) -> bool:
    """Within what BF16 activations and results cost."""
    return bool((result.double() - truth).norm() <= 6e-3 * truth.norm())
