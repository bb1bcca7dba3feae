"""What the names of a checkpoint's weights say about the experts' number format."""

from __future__ import annotations

import re
from pathlib import Path

from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError
from epfuse.input_file import read_object
from epfuse.weights.checkpoint_format import Checkpoint

INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 24 << 20
"""Bytes of an index; 70,000 matrices and their scales take some 16 MB of names."""
SECOND_SCALE = re.compile(r"weight_scale_2|\w*global_scale|input_scale|g_idx|\w*zero_point|qzeros")
"""Tensors that none of the formats that are read has: NVFP4's second scales, static scales, integer formats."""


@checks_enums
def check_names(folder: Path, checkpoint: Checkpoint, module: str) -> None:
    """Compare the names in a folder's index with the format that its config says.

    Args:
        folder: of the model; nothing is compared where it has no index.
        checkpoint: what the config says.
        module: where in a layer the experts are.

    Raises:
        ConfigError: the index can't be read, or the names are of another format.
    """
    path = folder / INDEX
    if not path.exists():
        return
    ends = {
        name.rpartition(".")[2]
        for name in weight_map(path)
        if re.search(rf"(^|\.)layers\.[0-9]+\.{re.escape(module)}\.", name)
    }
    if not ends:
        return
    second = sorted(end for end in ends if SECOND_SCALE.fullmatch(end))
    if second:
        raise ConfigError(f"index {path}: the experts have {second[0]!r:.60}, which no format that is read has")
    scaled = sorted(end for end in ends if "scale" in end or "packed" in end or "blocks" in end)
    if (checkpoint is Checkpoint.BF16) != (not scaled):
        seen = f"have {scaled[0]!r:.60}" if scaled else "have no scales"
        raise ConfigError(f"index {path}: the experts {seen}, and the config says {checkpoint.value}")


def weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index says.

    Raises:
        ConfigError: the index can't be read, or is none.
    """
    names = read_object(path, "index", LARGEST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ConfigError(f"index {path} has no weight_map from tensors to files")
    return names
