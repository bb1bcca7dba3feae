"""A plugin of vLLM for measuring: vLLM 0.25.1's MiniMax-M3 on a Hopper GPU where flashinfer is not installed."""

from __future__ import annotations

CLASS = "MiniMaxM3SparseForCausalLM"


def register() -> None:
    """Make vLLM know the model, which is imported when it is needed, and its text config."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config

    dict.__setitem__(config._CONFIG_REGISTRY, "minimax_m3_text", "MiniMaxM3TextConfig")
    ModelRegistry.register_model(CLASS, f"tools.serve_on_gpu.m3_model:{CLASS}")
