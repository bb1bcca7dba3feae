"""A checkpoint that ranks load their shard from, without reading the experts of other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from epfuse.errors import MissingDependency, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.parallel.shard import held_experts

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise MissingDependency("sharded loading needs safetensors: pip install 'epfuse[demo]'") from error


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write every parameter and every buffer, the non-persistent ones too, to a safetensors file.

    The non-persistent buffers make a model that was built on the meta device complete after `load_sharded`.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def load_sharded(model: nn.Module, path: Path, sharded: Mapping[str, ExpertMap], device: torch.device) -> None:
    """Fill a model, on the meta device or not, from a checkpoint of the unsharded one.

    Args:
        model: changed in place; afterwards its parameters and buffers live on ``device``.
        path: safetensors file of `save_checkpoint`, full ``[E, ...]`` expert tensors inside.
        sharded: parameter name -> the expert map that cuts its first dimension; only those rows are read.
        device: where the tensors go.

    Raises:
        ShapeError: a tensor of the file does not have the model's shape (after sharding).
        KeyError: the file lacks a tensor of the model.
    """
    with safe_open(path, framework="pt") as file:
        for name, old in [*model.named_parameters(), *model.named_buffers()]:
            if name in sharded:
                rows = file.get_slice(name)
                new = torch.stack([rows[expert] for expert in held_experts(sharded[name])])
            else:
                new = file.get_tensor(name)
            if new.shape != old.shape:
                raise ShapeError(
                    f"{name} has shape {tuple(new.shape)} in {path.name}; the model needs {tuple(old.shape)}"
                )
            _assign(model, name, new.to(device, old.dtype), isinstance(old, nn.Parameter))


def _assign(model: nn.Module, name: str, value: torch.Tensor, is_parameter: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if is_parameter:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[leaf] = value
