"""Test only: a vLLM plugin without which stock vLLM can't serve MiniMax-M3 on a CPU.

vLLM 0.32 has no CPU form of three of M3's parts: Gemma RMS norms (FlashInfer's), the fused QK norm and RoPE, and
sigmoid routing with a correction bias. They are given in plain PyTorch. The routed experts are not touched here.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes; the model itself is imported where it is built."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config

    dict.__setitem__(config._CONFIG_REGISTRY, "minimax_m3_text", "MiniMaxM3TextConfig")  # M3 without its vision tower
    ModelRegistry.register_model("MiniMaxM3SparseForCausalLM", "m3_on_cpu_model:MiniMaxM3SparseForCausalLM")
