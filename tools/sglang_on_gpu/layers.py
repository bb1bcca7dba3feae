"""One layer's experts as SGLang builds and calls them: its method, its loader's parameters, dispatcher and runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_flags, get_parallel

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import WeightFormat
from epfuse.integrations.sglang import hooks
from epfuse.integrations.sglang.experts import EpfuseMoEMethod, EpfuseRunnerCore
from epfuse.integrations.sglang.rules import NAME, TRITON
from epfuse.verify.budget import dense_tolerance

MXFP8 = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}


def install_plugin() -> None:
    """Put epfuse's hooks on SGLang, as its plugin does when a server starts."""
    hooks.install()
    HookRegistry.apply_hooks()


@contextmanager
def first_rank(layer: Layer, most_tokens: int) -> Iterator[None]:
    """SGLang's state of a process, around all that is built and called.

    Args:
        layer: whose first expert parallel rank this is.
        most_tokens: ``--chunked-prefill-size``, for which kernels are compiled.
    """
    ranks = layer.ep_size
    sizes: dict[str, Any] = {
        "tp_size": ranks,
        "attn_tp_size": ranks,
        "tp_group": SimpleNamespace(world_size=ranks),
        "moe_ep_size": ranks,
        "moe_ep_rank": 0,
        "moe_tp_size": 1,
        "moe_tp_rank": 0,
    }
    with get_context().override_server_args(chunked_prefill_size=most_tokens), get_parallel().override(**sizes):
        yield


@contextmanager
def running(runner: str) -> Iterator[None]:
    """Have SGLang take this runner, as ``--moe-runner-backend`` would; within `first_rank`."""
    flags, before = get_flags().moe, get_flags().moe.runner_backend
    flags.runner_backend = resolve_moe_runner_backend(runner)
    try:
        yield
    finally:
        flags.runner_backend = before


def build(weights: LayerWeights, runner: str, form: WeightFormat) -> FusedMoE:
    """SGLang's layer with these numbers, ready to be called; within `first_rank`.

    Args:
        weights: of the rank.
        runner: ``epfuse`` or ``triton``.
        form: MXFP8 or DENSE, as the checkpoint has it.
    """
    shape, gate = weights.layer.shape, weights.layer.activation
    with weights.device, running(runner):
        made = FusedMoE(
            shape.experts,
            shape.hidden,
            shape.intermediate,
            layer_id=0,
            top_k=shape.top_k,
            params_dtype=torch.bfloat16,
            quant_config=Fp8Config.from_config(dict(MXFP8)) if form is WeightFormat.MXFP8 else None,
            prefix="model.layers.0.mlp.experts",
            inplace=False,  # inputs are used again
            gemm1_alpha=gate.alpha,
            gemm1_beta=gate.beta,
            gemm1_clamp_limit=gate.limit,
            gate_up_interleaved=False,
        )
    for name, tensor in _parameters(weights, form).items():
        getattr(made, name).data.copy_(tensor)
    with running(runner):
        made.quant_method.process_weights_after_loading(made)
    ours = isinstance(made.quant_method, EpfuseMoEMethod)
    if ours != (runner == NAME):
        raise RuntimeError(f"--moe-runner-backend {runner} built {type(made.quant_method).__name__}")
    return made


def contender(weights: LayerWeights, runner: str, form: WeightFormat) -> Contender:
    """A runner on one kind of weights, for `epfuse.bench.run.run_points`.

    Args:
        weights: of the rank.
        runner: as of `build`.
        form: as of `build`.
    """
    made = build(weights, runner, form)

    def bind(inputs: Inputs) -> Call:
        logits = inputs.hidden.new_zeros(inputs.tokens, weights.layer.shape.experts)
        topk = StandardTopKOutput(inputs.topk_weights, inputs.topk_ids, logits)

        def call() -> torch.Tensor:
            with running(runner):
                result: torch.Tensor = made(inputs.hidden, topk)
            return result

        return call

    shape, is_ours = weights.layer.shape, runner == NAME
    return Contender(
        EpfuseRunnerCore.__name__ if is_ours else "TritonRunnerCore",
        ContenderKind.PATH if is_ours else ContenderKind.PEER,
        "mxfp8" if form is WeightFormat.MXFP8 else "bf16",
        form,
        MatrixOperand.BF16,
        dense_tolerance(torch.bfloat16, shape.hidden, shape.intermediate) if is_ours else PEER_TOLERANCE,
        TimingMethod.GRAPH if weights.device.type == "cuda" else TimingMethod.PLAIN,
        bind,
        "epfuse's runner in SGLang's FusedMoE"
        if is_ours
        else "SGLang's own; two operators of its wheel by their twins",
    )


def contenders(weights: LayerWeights) -> list[Contender]:
    """Ours on both kinds of weights, and SGLang's Triton runner on BF16."""
    kinds = ((NAME, WeightFormat.MXFP8), (NAME, WeightFormat.DENSE), (TRITON, WeightFormat.DENSE))
    return [contender(weights, runner, form) for runner, form in kinds]


def _parameters(weights: LayerWeights, form: WeightFormat) -> dict[str, torch.Tensor]:
    """By SGLang's names; w13 has gate above up there, as here."""
    if form is WeightFormat.DENSE:
        return {"w13_weight": weights.dense.w13, "w2_weight": weights.dense.w2}
    packed = weights.mxfp8
    return {
        "w13_weight": packed.w13.values,
        "w13_weight_scale_inv": packed.w13.scales,
        "w2_weight": packed.w2.values,
        "w2_weight_scale_inv": packed.w2.scales,
    }
