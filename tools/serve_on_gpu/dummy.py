"""Dummy weights that are numbers of a real model's size: vLLM's own are so small that they are zero in E4M3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCALES = (116, 120)
"""E8M0 bytes of dummy scales, the second excluded: 2^-11 to 2^-8."""


@torch.no_grad()
def fill(data: torch.Tensor, kind: str, seed: int) -> None:
    """Give a parameter numbers from a seed.

    Args:
        data: filled.
        kind: name of its module's class and its own: norms are a scale of one, embeddings of unit size; empty where
            vLLM does not say.
        seed: of its numbers.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    if data.dtype == torch.uint8:
        data.random_(*SCALES, generator=generator)
    elif data.dtype == torch.float8_e4m3fn:
        for row in data:  # an expert at a time: the float32 numbers of all would not fit
            numbers = torch.randn(row.shape, generator=generator, device=data.device)
            row.copy_(numbers.mul_(8).clamp_(-448, 448))
    elif not data.is_floating_point():
        data.zero_()
    elif "norm" in kind.lower() or (data.dim() == 1 and not kind):
        data.fill_(0 if "Gemma" in kind else 1)  # Gemma's norms add one
    elif data.dim() >= 2:
        deviation = 1 if "VocabParallelEmbedding" in kind else data.shape[-1] ** -0.5
        for row in data if data.dim() > 2 else [data]:
            row.normal_(0, deviation, generator=generator)
    else:
        data.zero_()


def numbers() -> tuple[Callable[..., None], Callable[..., None]]:
    """What fills a module's own parameters, and what fills one tensor; each parameter has a seed of its own."""
    last = 0

    def of_tensor(tensor: torch.Tensor, *_: Any, kind: str = "", **__: Any) -> None:
        nonlocal last
        if tensor.device.type != "meta":
            last += 1
            fill(tensor.data, kind, last)

    def of_module(module: Any, *_: Any, **__: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            of_tensor(parameter, kind=type(module).__name__ + name)

    return of_module, of_tensor


def use() -> None:
    """Have vLLM's ``--load-format dummy`` take these numbers.

    vLLM 0.25.1 fills module by module; 0.32 and 0.33 fill tensor by tensor and name no module, buffers among them,
    which an expert map and scales are. So the loader's walk is ours, and leaves buffers alone.
    """
    from vllm.model_executor.model_loader import dummy_loader

    of_module, of_tensor = numbers()

    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        for module in model.modules():
            info = dummy_loader.get_layerwise_info(module)
            if info.can_load():  # quantised while loading, by vLLM, which fills its tensors with the function below
                self._process_online_quant_layer(module, info)
            else:
                of_module(module)

    dummy_loader.initialize_single_dummy_weight = of_tensor
    dummy_loader.DummyModelLoader.load_weights = load_weights
