"""The tensors of a Hugging Face folder: one safetensors file, or shards that an index names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from epfuse.errors import CheckpointError
from epfuse.weights.tensor_file import StoredTensor, TensorFile
from epfuse.weights.weight_names import INDEX, weight_map

SINGLE = "model.safetensors"
MOST_SHARDS = 4096
MOST_TENSORS = 1 << 20
"""Of all files together; the largest known models have some 150,000."""


class TensorFolder:
    """All tensors of a model, by name; their headers are read and checked, and none of their bytes.

    Args:
        folder: with ``model.safetensors``, or with ``model.safetensors.index.json`` and the shards that it names. A
            shard lies in the folder itself. Symbolic links lead to files of the folder, or to the ``blobs`` beside
            ``snapshots`` in a cache of the hub.

    Attributes:
        folder: the same.
        tensors: name -> where it is.
        strays: names that stand in a shard and that the index does not put there.

    Raises:
        CheckpointError, ConfigError: a file is missing, can't be read, is no safetensors file, or leads out of the
            folder; the index and the files contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors: dict[str, StoredTensor] = {}
        strays: dict[str, TensorFile] = {}
        for file, names in self._files():
            for name, tensor in file.tensors.items():
                if names is None or name in names:
                    tensors[name] = tensor
                else:
                    strays[name] = file
            if len(tensors) + len(strays) > MOST_TENSORS:
                raise CheckpointError(f"{folder} has more than {MOST_TENSORS} tensors; it is no model's")
            missing = sorted((names or frozenset()).difference(file.tensors))
            if missing:
                raise CheckpointError(
                    f"{file.path} lacks {missing[0]!r:.80}, which {INDEX} says is there ({len(missing)} such names)"
                )
        self.tensors: Mapping[str, StoredTensor] = tensors
        self.strays: Mapping[str, TensorFile] = strays

    @staticmethod
    @contextmanager
    def reading(tensors: Iterable[StoredTensor]) -> Iterator[None]:
        """Keep the files of some tensors open.

        Raises:
            CheckpointError: one of them is another file by now.
        """
        with ExitStack() as stack:
            for file in dict.fromkeys(tensor.file for tensor in tensors):
                stack.enter_context(file.open())
            yield

    def _files(self) -> Iterator[tuple[TensorFile, frozenset[str] | None]]:
        """Every file, with the names that the index puts there; None where there is no index."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not os.path.lexists(index):
            if not os.path.lexists(single):
                raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}{self._others()}")
            yield TensorFile(self._inside(SINGLE)), None
            return
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map(index).items():
            shards.setdefault(shard, []).append(name)
        if os.path.lexists(single) and SINGLE not in shards:
            raise CheckpointError(
                f"{self.folder} has {SINGLE} and {INDEX}, which does not name it; remove what is not the model's"
            )
        if len(shards) > MOST_SHARDS:
            raise CheckpointError(f"{index} names {len(shards)} files; at most {MOST_SHARDS} are read")
        for shard, names in sorted(shards.items()):
            yield TensorFile(self._inside(shard)), frozenset(names)

    def _inside(self, shard: str) -> Path:
        """A shard's path, if the name stays in the folder."""
        path = self.folder / shard
        if not shard.endswith(".safetensors") or "/" in shard or "\0" in shard:
            raise CheckpointError(
                f"{INDEX} names the shard {shard!r:.80}; a shard is a *.safetensors file in the folder"
            )
        if not os.path.lexists(path):
            raise CheckpointError(f"{path} is missing, and {INDEX} names it; download the folder again")
        folder, target = Path(os.path.realpath(self.folder)), Path(os.path.realpath(path))
        blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
        if target.parent not in (folder, *blobs):
            raise CheckpointError(
                f"{path} is a link that leads out of the folder, to {target}; put the file itself there"
            )
        return path

    def _others(self) -> str:
        """What an error says of weights in another form."""
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))[:1]
        return f"; {pickled[0]} is no safetensors file, and a pickle is never read" if pickled else ""
