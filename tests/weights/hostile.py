"""Folders of a checkpoint in two shards, and changes of their files at random."""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from epfuse import ExpertMap, ExpertWeights
from epfuse.errors import EpfuseError
from epfuse.weights.checkpoint import ExpertCheckpoint
from tests.mutations import mutated_bytes, mutated_values

EXPERTS, HIDDEN, WIDTH = 4, 64, 32
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
SHARE = ExpertMap.contiguous(EXPERTS, 2, 1)
LOCAL = (2, 3)
"""The experts of `SHARE`, by slot."""
CASES = 300


def write(folder: Path, held: dict[str, torch.Tensor], config: Any) -> None:
    names = sorted(held)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: held[name] for name in half}, folder / shard)
    where = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> ExpertWeights:
    ((_, weights),) = ExpertCheckpoint(folder).load(SHARE)
    return weights


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def fuzz(
    folder: Path, config: Any, check: Callable[[ExpertWeights, Mapping[str, torch.Tensor]], None], part: int
) -> None:
    """Headers, indices, configs and bytes of files; whatever loads, safetensors itself reads as the same bytes.

    Args:
        folder: as `write` made it.
        config: its config.json.
        check: that weights are those of the tensors.
        part: seed.
    """
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng = random.Random(part)
    header, data = header_of(folder / SHARDS[1])
    streams = [
        ("config.json", mutated_values(config, CASES, part)),
        (INDEX, mutated_values(json.loads(good[INDEX]), CASES, part)),
        (SHARDS[1], mutated_values(header, CASES, part)),
        (SHARDS[1], mutated_bytes(good[SHARDS[1]], CASES, part)),
    ]
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    loaded = refused = 0
    for case in range(CASES // 4):
        kind = case % len(streams)
        name, stream = streams[kind]
        changed = next(stream)
        if kind == 2:
            with_header(folder / name, changed, data[: rng.choice((len(data), len(data), len(data) - 1))])
        else:
            (folder / name).write_bytes(changed)
        try:
            weights = load(folder)
        except EpfuseError:
            refused += 1
        else:
            loaded += 1
            if weights.local_experts == 2 and weights.hidden == HIDDEN and kind:
                check(weights, {k: v for shard in SHARDS for k, v in load_file(folder / shard).items()})
        (folder / name).write_bytes(good[name])
    assert refused > 30
    assert loaded > 0
    assert time.monotonic() - begin < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10
