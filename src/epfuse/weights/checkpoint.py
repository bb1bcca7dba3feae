"""What a rank loads without reading the experts of other ranks.

`ExpertCheckpoint` gives the experts of a Hugging Face folder as `ExpertWeights`, a layer at a time. `load_sharded`
fills a whole model from the file that `save_checkpoint` wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from epfuse.arguments import integer
from epfuse.errors import CheckpointError, ConfigError, MissingDependency, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.numerics.reinterpret import reinterpret
from epfuse.parallel.placement import RankShare
from epfuse.parallel.shard import check_whole, held_experts
from epfuse.weights.expert_tensors import LayerTensors, find_layers
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.model_config import ExpertModel, read_model
from epfuse.weights.read_layer import LayerReader
from epfuse.weights.tensor_file import StoredTensor, TensorFile
from epfuse.weights.tensor_folder import TensorFolder


def _silent(nbytes: int) -> None:
    """Nobody watches."""


class ExpertCheckpoint:
    """The experts of a Hugging Face folder. Config, names, shapes and dtypes are checked; none of the weights is read.

    All families of `epfuse.weights.config_families` whose experts are a tensor a matrix (``experts.7.w1.weight``) or
    stacks (``experts.gate_up_proj``): BF16, FP16 and FP32; MXFP8 with scale bytes as uint8 or float8_e8m0fnu; 128x128
    block FP8; MXFP4 as gpt-oss has it, which becomes MXFP8, exactly, in twice the bytes. Biases become float32.

    Args:
        folder: with config.json and safetensors files, see `TensorFolder`.
        group: which group of experts, where a layer has one for each kind of tokens (Ernie-VL: 0 text, 1 images); all
            are checked, and one is loaded. None where there is one.

    Attributes:
        folder: the same.
        model: what its config.json says, of the group.
        layers: layer -> where its experts are, ascending.

    Raises:
        ConfigError: config.json or the index is not understood, or contradicts itself; there is no such group, or
            there are several and none was named.
        CheckpointError, ShapeError, DtypeError: the files can't be read, or are not what the config says.
    """

    def __init__(self, folder: Path, group: int | None = None) -> None:
        self.folder: Path = Path(folder)
        groups = read_model(self.folder).parts
        if group is None and len(groups) > 1:
            raise ConfigError(
                f"folder {self.folder} has {len(groups)} groups of experts in a layer; group must say which of them is"
                " to be loaded, and 0 is of text"
            )
        index = integer("group", 0 if group is None else group, most=len(groups) - 1)
        self.model: ExpertModel = groups[index]
        self.layers: Mapping[int, LayerTensors] = find_layers(TensorFolder(self.folder), groups)[index]

    def bytes_of(self, experts: ExpertMap | RankShare) -> int:
        """Bytes that `load` reads for a rank; arguments and errors as there."""
        return sum(len(self._held(experts)) * layer.expert_bytes for layer in self.layers.values())

    def load(
        self,
        experts: ExpertMap | RankShare,
        device: torch.device | str = "cpu",
        on_bytes: Callable[[int], None] = _silent,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """One rank's experts of every layer, a layer at a time; nothing else is read.

        Memory: the result, and where the device is a GPU or the order another one, one expert's matrix beside it.

        Args:
            experts: which experts the rank holds: a map, or where some have copies ``placement.share(rank)``, since a
                map is one of physical ids then. Row ``l`` of the result is the expert in slot ``l``.
            device: where the weights go.
            on_bytes: told how many bytes were read, after each tensor or row of one.

        Yields:
            The layer's index in the model, and its weights as the checkpoint has them: `ExpertWeights.prepare` is next.

        Raises:
            ShapeError: the map or the share is of another number of experts than E.
            CheckpointError: a file can't be read, or was changed meanwhile.
        """
        for index in self.layers:
            yield index, self.load_layer(index, experts, device, on_bytes)

    def load_layer(
        self,
        index: int,
        experts: ExpertMap | RankShare,
        device: torch.device | str = "cpu",
        on_bytes: Callable[[int], None] = _silent,
    ) -> ExpertWeights:
        """One layer of `load`.

        Raises:
            CheckpointError: the layer has no experts; or as `load`.
        """
        if index not in self.layers:
            raise CheckpointError(f"layer {index} has no experts; those that have are {_some(list(self.layers))}")
        held = self._held(experts)
        layer = self.layers[index]
        reader = LayerReader(self.model, layer, held, torch.device(device), on_bytes)
        with TensorFolder.reading(layer.of(held)):
            return reader.weights()

    def _held(self, experts: ExpertMap | RankShare) -> Sequence[int]:
        """The experts by slot, of as many as the model has: for others, bytes of other tensors would be read."""
        is_map = isinstance(experts, ExpertMap)
        if experts.num_experts != self.model.experts:
            hint = " (where experts have copies, pass placement.share(rank))" if is_map else ""
            raise ShapeError(
                f"the expert {'map' if is_map else 'share'} is of E={experts.num_experts} experts; the model has"
                f" {self.model.experts}{hint}"
            )
        return held_experts(experts) if isinstance(experts, ExpertMap) else experts.held


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write every parameter and every buffer, the non-persistent ones too, to a safetensors file.

    The non-persistent buffers make a model that was built on the meta device complete after `load_sharded`. A tensor
    with several names is written once, under the first.

    Raises:
        CheckpointError: a tensor has no memory (meta device), or the file can't be written.
        LayoutError: a tensor is split over ranks, packed or sparse.
        ConfigError: experts were prepared, so that their memory is in a GPU's own order.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingDependency("writing a checkpoint needs safetensors: pip install 'epfuse[demo]'") from error
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
    file = TensorFile(path)
    sources = [file.tensors[name] for name in _matched(wanted, set(file.tensors), path)]
    for held, source in zip(wanted, sources, strict=True):
        _check(held, source, _map_of(held, sharded), path)
    with file.open():
        for held, source in zip(wanted, sources, strict=True):
            held.replace_by(_read(source, _map_of(held, sharded)), device)


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


def _check(held: _Held, source: StoredTensor, expert_map: ExpertMap | None, path: Path) -> None:
    needed = tuple(held.tensor.shape)
    if expert_map is not None:
        if not needed or needed[0] != expert_map.num_local:
            raise ShapeError(f"{held.name} has shape {needed}; its expert map needs L={expert_map.num_local} rows")
        needed = (expert_map.num_experts, *needed[1:])
    if source.shape != needed:
        raise ShapeError(f"{source.name} has shape {source.shape} in {path.name}; the model needs {needed}")
    # no row of it is read: its dtype is what matters
    reinterpret(source.name, torch.empty(0, dtype=source.dtype, device="cpu"), held.tensor.dtype)


def _read(source: StoredTensor, expert_map: ExpertMap | None) -> torch.Tensor:
    if expert_map is None:
        return source.read()
    held = held_experts(expert_map)
    rows = torch.empty((len(held), *source.shape[1:]), dtype=source.dtype, device="cpu")
    for row, expert in zip(rows, held, strict=True):
        source.read_into(row, expert)
    return rows


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
