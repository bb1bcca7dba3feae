"""A checkpoint that ranks load their shard from, without reading the experts of other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epfuse.errors import CheckpointError, MissingDependency, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.numerics.reinterpret import reinterpret
from epfuse.parallel.shard import check_whole, held_experts

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as _missing:
    raise MissingDependency("sharded loading needs safetensors: pip install 'epfuse[demo]'") from _missing


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write every parameter and every buffer, the non-persistent ones too, to a safetensors file.

    The non-persistent buffers make a model that was built on the meta device complete after `load_sharded`. A tensor
    with several names is written once, under the first.

    Raises:
        CheckpointError: a tensor has no memory (meta device), or the file can't be written.
        LayoutError: a tensor is split over ranks, packed or sparse.
        ConfigError: experts were prepared, so that their memory is in a GPU's own order.
    """
    model.state_dict()  # experts that can't be saved any more refuse here
    tensors: dict[str, torch.Tensor] = {}
    written: set[int] = set()
    for held in _held_tensors(model):
        if held.tensor.is_meta:
            raise CheckpointError(f"{held.name} is on the meta device and has no numbers to save: load the model first")
        tensor = held.tensor.detach().contiguous().cpu()
        memory = tensor.untyped_storage().data_ptr()
        # two views of one memory are two tensors in the file
        tensors[held.name] = tensor.clone() if memory in written else tensor
        written.add(memory)
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: a checkpoint can't be written there")
    try:
        save_file(tensors, path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as reason:
        raise CheckpointError(f"{path} can't be written: {reason}") from reason


def load_sharded(model: nn.Module, path: Path, sharded: Mapping[str, ExpertMap], device: torch.device) -> None:
    """Fill a model, on the meta device or not, from a checkpoint of the unsharded one.

    The file and the model must have the same tensors. All of them are compared before the first is read, so a file that
    is refused changes nothing. Bits are kept: only E8M0 scales may change their dtype, between uint8 and
    float8_e8m0fnu (`epfuse.numerics.reinterpret`).

    Args:
        model: changed in place; afterwards its parameters and buffers live on ``device``.
        path: safetensors file of `save_checkpoint`, full ``[E, ...]`` expert tensors inside.
        sharded: parameter name -> the expert map that cuts its first dimension; only those rows are read.
        device: where the tensors go.

    Raises:
        CheckpointError: not a safetensors file, or one that lacks a tensor of the model, or has one that the model
            lacks; ``sharded`` names a tensor that the model doesn't have.
        ShapeError: a tensor of the file does not have the model's shape (before sharding).
        DtypeError: a tensor of the file would have to be cast.
        LayoutError: a tensor of the model is split over ranks, packed or sparse.
        ConfigError: experts were prepared, so that their memory is in a GPU's own order.
    """
    path = Path(path)
    model.state_dict()  # experts that can't be loaded any more refuse here
    wanted = _held_tensors(model)
    unknown = sorted(set(sharded) - {name for held in wanted for name in held.names})
    if unknown:
        raise CheckpointError(f"sharded names {_some(unknown)}, which the model {type(model).__name__} does not have")
    with _opened(path) as file:
        sources = _matched(wanted, set(file.keys()), path)
        for held, source in zip(wanted, sources, strict=True):
            _check(held, source, file, _map_of(held, sharded), path)
        for held, source in zip(wanted, sources, strict=True):
            held.replace_by(_read(file, source, _map_of(held, sharded)), device)


@dataclass(frozen=True)
class _Held:
    """A tensor of a model, with every place that it has there.

    Attributes:
        model: the whole model.
        names: all its names; more than one where weights are tied.
        tensor: parameter or buffer.
    """

    model: nn.Module
    names: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def name(self) -> str:
        return self.names[0]

    def replace_by(self, value: torch.Tensor, device: torch.device) -> None:
        """Put ``value`` in every place, so that what was tied stays tied."""
        new = reinterpret(self.name, value, self.tensor.dtype).to(device)
        parameter = nn.Parameter(new, requires_grad=False) if isinstance(self.tensor, nn.Parameter) else None
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if parameter is not None:
                module._parameters[leaf] = parameter
            else:
                module._buffers[leaf] = new


def _held_tensors(model: nn.Module) -> list[_Held]:
    """Every parameter, then every buffer, each once."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        check_whole(name, tensor)
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    return [_Held(model, tuple(names[key]), tensor) for key, tensor in tensors.items()]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():  # opening a FIFO would wait for ever
        raise CheckpointError(f"{path} is not a file: a checkpoint that save_checkpoint wrote is needed")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"{path} can't be read as safetensors: {reason}") from reason


def _matched(wanted: list[_Held], found: set[str], path: Path) -> list[str]:
    """The name in the file of each tensor."""
    sources = []
    for held in wanted:
        present = [name for name in held.names if name in found]
        if len(present) > 1:
            raise CheckpointError(f"{path.name} has {_some(present)} apart, which are one tensor in the model")
        sources += present
    missing = sorted(held.name for held in wanted if not found.intersection(held.names))
    extra = sorted(found.difference(sources))
    if missing or extra:
        faults = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
        raise CheckpointError(f"{path.name} is not this model's checkpoint: it {' and '.join(faults)}")
    return sources


def _map_of(held: _Held, sharded: Mapping[str, ExpertMap]) -> ExpertMap | None:
    return next((sharded[name] for name in held.names if name in sharded), None)


def _check(held: _Held, source: str, file: Any, expert_map: ExpertMap | None, path: Path) -> None:
    rows = file.get_slice(source)
    needed = tuple(held.tensor.shape)
    if expert_map is not None:
        if not needed or needed[0] != expert_map.num_local:
            raise ShapeError(f"{held.name} has shape {needed}; its expert map needs L={expert_map.num_local} rows")
        needed = (expert_map.num_experts, *needed[1:])
    found = tuple(rows.get_shape())
    if found != needed:
        raise ShapeError(f"{source} has shape {found} in {path.name}; the model needs {needed}")
    # no row of it is read: its dtype is what matters
    reinterpret(source, rows[0:0] if needed else file.get_tensor(source), held.tensor.dtype)


def _read(file: Any, source: str, expert_map: ExpertMap | None) -> torch.Tensor:
    if expert_map is None:
        whole: torch.Tensor = file.get_tensor(source)
        return whole
    rows = file.get_slice(source)
    held = [rows[expert] for expert in held_experts(expert_map)]
    none_held: torch.Tensor = rows[0:0]
    return torch.stack(held) if held else none_held


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
