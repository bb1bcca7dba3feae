"""One layer's experts as vLLM builds and calls them: prepare, experts, finalize, in its own workspaces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    fp8_w8a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.fused_moe.experts.mxfp8_emulation_moe import Mxfp8EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

from epfuse.bench.contender import PEER_TOLERANCE, Contender, ContenderKind
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.peers import vllm_experts
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import Bias, Policy, WeightFormat
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap
from epfuse.integrations.vllm.experts import EpfuseExperts
from epfuse.integrations.vllm.versions import GPT_OSS
from epfuse.policy import Checkpoint, LayerRequest, Storage, plan_layer
from epfuse.target import Target, device_name
from epfuse.verify.budget import Tolerance, dense_tolerance

MXFP8_BLOCK = [1, 32]


@dataclass(frozen=True)
class LayerKernel:
    """One rank's experts of one layer behind vLLM's interface.

    Attributes:
        kernel: vLLM's FusedMoEKernel: prepare without data or expert parallel dispatch, experts, finalize.
        w1: as the experts want it.
        w2: the same.
        experts: E.
        expert_map: ``[E]`` int32; None where every expert is local.
        activation: in vLLM's word.
    """

    kernel: Any
    w1: torch.Tensor
    w2: torch.Tensor
    experts: int
    expert_map: torch.Tensor | None
    activation: MoEActivation

    def call(self, hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """``[T, H]``: what vLLM's quantisation method returns for one step."""
        output: torch.Tensor = self.kernel.apply(
            hidden_states=hidden,
            w1=self.w1,
            w2=self.w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=self.activation,
            global_num_experts=self.experts,
            expert_map=self.expert_map,
            apply_router_weight_on_input=False,
        )
        return output


@dataclass(frozen=True)
class ExpertsCandidate:
    """One experts class on one kind of weights.

    Attributes:
        name: of the class.
        kind: ours or vLLM's.
        stored: how its weights lie in memory, in a word.
        form: the format whose bytes are its floor.
        kernel: ready to be called.
        tolerance: what its results must reach.
        note: for a reader who compares.
    """

    name: str
    kind: ContenderKind
    stored: str
    form: WeightFormat
    kernel: LayerKernel
    tolerance: Tolerance
    note: str

    @property
    def label(self) -> str:
        """Name and weights."""
        return f"{self.name} {self.stored}"

    def contender(self) -> Contender:
        """For `epfuse.bench.run.run_points`."""

        def bind(inputs: Inputs) -> Call:
            return lambda: self.kernel.call(inputs.hidden, inputs.topk_weights, inputs.topk_ids)

        method = TimingMethod.GRAPH if self.kernel.w1.is_cuda else TimingMethod.PLAIN
        return Contender(
            self.name, self.kind, self.stored, self.form, MatrixOperand.BF16, self.tolerance, method, bind, self.note
        )


def moe_config(layer: Layer, device: torch.device) -> FusedMoEConfig:
    """What vLLM knows of the layer on one of its expert-parallel ranks."""
    activation, gate = activation_of(layer)
    config = vllm_experts.moe_config(fused_moe, layer, device, activation)
    return replace(
        config,
        moe_parallel_config=replace(config.moe_parallel_config, ep_size=layer.ep_size, use_ep=layer.ep_size > 1),
        has_bias=layer.bias is Bias.ADDED,
        swiglu_limit=gate.get("gemm1_clamp_limit"),
        swiglu_alpha=gate.get("gemm1_alpha"),
        swiglu_beta=gate.get("gemm1_beta"),
    )


def activation_of(layer: Layer) -> tuple[MoEActivation, dict[str, float]]:
    """The activation in vLLM's word, and what it is given of its parameters.

    A layer with biases is as gpt-oss has it: gate and up rows alternate, and the parameters are fixed.
    """
    if layer.bias is Bias.NONE:
        return vllm_experts.activation_of(fused_moe, layer, limit_name="gemm1_clamp_limit")
    if layer.activation != GPT_OSS:
        raise ConfigError(f"vLLM knows biases beside {GPT_OSS} alone, not beside {layer.activation}")
    return MoEActivation.SWIGLUOAI, {}


def modular_kernel(experts: Any) -> Any:
    """The kernel object of vLLM for tokens that stay on their rank."""
    return mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


class Builder:
    """Makes kernels of one layer's weights; every class gets the same numbers.

    Args:
        weights: the layer's, MXFP8.
        target: the GPU.
        max_tokens: T of the largest call.
    """

    def __init__(self, weights: LayerWeights, target: Target, max_tokens: int) -> None:
        self._weights, self._target, self._max_tokens = weights, target, max_tokens
        self._layer = weights.layer
        self._config = moe_config(self._layer, weights.device)
        self._map: torch.Tensor | None = None
        if self._layer.ep_size > 1:
            held = ExpertMap.contiguous(self._layer.shape.experts, self._layer.ep_size, 0, weights.device)
            self._map = held.on(weights.device)
        self._activation, self._gate = activation_of(self._layer)

    def all(self) -> list[ExpertsCandidate]:
        """Ours and vLLM's, those that read MXFP8 first; beside biases, BF16's alone."""
        if self._layer.bias is Bias.ADDED:
            return [self.epfuse_bf16(), self.triton()]
        return [self.epfuse_mxfp8(), self.marlin(), self.epfuse_bf16(), self.emulation(), self.triton()]

    def epfuse_mxfp8(self) -> ExpertsCandidate:
        """`EpfuseExperts` on an MXFP8 checkpoint."""
        given = {name: tensor.clone() for name, tensor in self._mxfp8().items()}  # rearranged in their own memory
        quant = FusedMoEQuantConfig.make(
            "mxfp8",
            w1_scale=given["w13_weight_scale"],
            w2_scale=given["w2_weight_scale"],
            block_shape=MXFP8_BLOCK,
            **self._gate,
        )
        kernel = self._epfuse(given, quant, Checkpoint.MXFP8, Storage.MXFP8)
        return self._ours(kernel, "mxfp8", WeightFormat.MXFP8, "w8a16")

    def epfuse_bf16(self) -> ExpertsCandidate:
        """`EpfuseExperts` on a BF16 checkpoint."""
        w13, w2 = self._dense()
        given = {"w13_weight": w13, "w2_weight": w2} | self._biases
        kernel = self._epfuse(given, self._dense_quant(), Checkpoint.BF16, Storage.BF16)
        return self._ours(kernel, "bf16", WeightFormat.DENSE, "bf16")

    def marlin(self) -> ExpertsCandidate:
        """What vLLM 0.25.1 chooses for MXFP8 on Hopper."""
        w1, w2, w1_scale, w2_scale = vllm_experts.marlin_weights(self._weights)
        quant = fp8_w8a16_moe_quant_config(w1_scale, w2_scale, block_shape=MXFP8_BLOCK, **self._gate)
        kernel = self._kernel(marlin_moe.MarlinExperts(self._config, quant), w1, w2)
        return _vllms(kernel, "mxfp8", WeightFormat.MXFP8, "what vLLM 0.25.1 runs for MXFP8 on Hopper")

    def emulation(self) -> ExpertsCandidate:
        """What vLLM chooses for MXFP8 on gfx942; the weights become BF16 when they are loaded."""
        scales = self._mxfp8()
        quant = FusedMoEQuantConfig.make(
            "mxfp8",
            w1_scale=scales["w13_weight_scale"],
            w2_scale=scales["w2_weight_scale"],
            block_shape=MXFP8_BLOCK,
            **self._gate,
        )
        kernel = self._kernel(Mxfp8EmulationTritonExperts(self._config, quant), *self._dense())
        return _vllms(kernel, "bf16", WeightFormat.DENSE, "what vLLM runs for MXFP8 on gfx942: BF16 since loading")

    def triton(self) -> ExpertsCandidate:
        """What vLLM chooses for BF16 checkpoints."""
        kernel = self._kernel(TritonExperts(self._config, self._dense_quant()), *self._dense())
        return _vllms(kernel, "bf16", WeightFormat.DENSE, "what vLLM runs for BF16 checkpoints")

    def _mxfp8(self) -> dict[str, torch.Tensor]:
        packed = self._weights.mxfp8
        return {
            "w13_weight": packed.w13.values,
            "w13_weight_scale": packed.w13.scales,
            "w2_weight": packed.w2.values,
            "w2_weight_scale": packed.w2.scales,
        }

    def _dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._w13, self._weights.dense.w2

    @cached_property
    def _w13(self) -> torch.Tensor:
        """``[L, 2I, H]`` BF16, as the activation wants its rows."""
        return self._as_vllm_has(self._weights.dense.w13)

    @cached_property
    def _biases(self) -> dict[str, torch.Tensor]:
        """By vLLM's names, BF16; none of a layer without."""
        held = dict(self._weights.source.biases)
        if not held:
            return {}
        rows = self._as_vllm_has(held["gate_up_bias"])
        return {"w13_bias": rows.bfloat16(), "w2_bias": held["down_bias"].bfloat16()}

    def _as_vllm_has(self, rows: torch.Tensor) -> torch.Tensor:
        """What lies along gate and up rows, ``[L, 2I, ..]``: in turn if the activation is `SWIGLUOAI`."""
        if self._activation is not MoEActivation.SWIGLUOAI:
            return rows
        halves = rows.reshape(rows.shape[0], 2, -1, *rows.shape[2:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def _dense_quant(self) -> FusedMoEQuantConfig:
        biases = {name.replace("w13", "w1"): bias for name, bias in self._biases.items()}
        return FusedMoEQuantConfig.make(**self._gate, **biases)

    def _kernel(self, experts: Any, w1: torch.Tensor, w2: torch.Tensor) -> LayerKernel:
        return LayerKernel(modular_kernel(experts), w1, w2, self._layer.shape.experts, self._map, self._activation)

    def _epfuse(
        self, given: dict[str, torch.Tensor], quant: Any, checkpoint: Checkpoint, stored: Storage
    ) -> LayerKernel:
        request = LayerRequest(
            target=self._target,
            shape=self._layer.shape,
            ep_size=self._layer.ep_size,
            max_model_len=8192,
            layer=0,
            moe_layers=(0,),
            activation=self._layer.activation,
            bias=self._layer.bias,
            checkpoint=checkpoint,
            stored=stored,
            device_name=device_name(self._weights.device) if self._weights.device.type == "cuda" else None,
        )
        # what EpfuseExperts.load reads of vLLM's RoutedExperts
        layer = torch.nn.Module()
        layer.layer_name, layer.activation, layer.expert_map = "layer", self._activation, self._map
        for name, tensor in given.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        experts = EpfuseExperts(self._config, quant)
        experts.load(layer, plan_layer(request, Policy.AUTO), self._max_tokens)
        return self._kernel(experts, layer.w13_weight, layer.w2_weight)

    def _ours(self, kernel: LayerKernel, stored: str, form: WeightFormat, path: str) -> ExpertsCandidate:
        shape = self._layer.shape
        tolerance = dense_tolerance(torch.bfloat16, shape.hidden, shape.intermediate)
        return ExpertsCandidate(
            EpfuseExperts.__name__, ContenderKind.PATH, stored, form, kernel, tolerance, f"path {path}"
        )


def _vllms(kernel: LayerKernel, stored: str, form: WeightFormat, note: str) -> ExpertsCandidate:
    name = type(kernel.kernel.fused_experts).__name__
    return ExpertsCandidate(name, ContenderKind.PEER, stored, form, kernel, PEER_TOLERANCE, note)
