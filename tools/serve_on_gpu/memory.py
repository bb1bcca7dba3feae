"""What torch's allocator holds of the GPU in vLLM's processes, sampled into files and read back."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from epfuse.errors import ConfigError

EVERY = "SERVE_ON_GPU_MEMORY"
"""Environment variable: seconds between two samples."""
STALE = 5.0
"""Seconds after which a process's last sample no longer says what it holds: its thread may have ended."""
MIB = 2**20

_sampled: set[int] = set()
"""Processes that sample: a fork has this set, but not the thread."""


@dataclass(frozen=True)
class TorchMemory:
    """MiB of one process, or of several together.

    Attributes:
        allocated: of tensors that live.
        most_allocated: the largest ``allocated`` since the process began, at any moment.
        reserved: that the allocator has from the driver, for tensors that live and that may come.
    """

    allocated: float
    most_allocated: float
    reserved: float


def sample_into(place: Path, seconds: float) -> None:
    """A line a sample in a file of this process, from when it uses a GPU on until it ends; once a process.

    Args:
        place: a folder.
        seconds: between samples.
    """
    import torch  # noqa: F401  (here, not in the thread: the process may fork)

    if os.getpid() not in _sampled:
        _sampled.add(os.getpid())
        threading.Thread(target=_sample, args=(place, seconds), daemon=True, name="memory").start()


def _sample(place: Path, seconds: float) -> None:
    import torch

    with (place / f"memory-{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8") as out:
        while True:
            time.sleep(seconds)
            if torch.cuda.is_initialized():  # a thread has a current device of its own, so all are asked
                gpus = [torch.cuda.memory_stats(gpu) for gpu in range(torch.cuda.device_count())]
                out.write(json.dumps({"time": round(time.time(), 3), **asdict(of_stats(gpus))}) + "\n")


def of_stats(gpus: Sequence[dict[str, Any]]) -> TorchMemory:
    """What torch's `memory_stats` of all GPUs say, which are bytes; a GPU that a process does not use has none."""

    def total(name: str, kind: str) -> float:
        return round(sum(stats.get(f"{name}_bytes.all.{kind}", 0) for stats in gpus) / MIB, 2)

    return TorchMemory(total("allocated", "current"), total("allocated", "peak"), total("reserved", "current"))


def read_samples(place: Path) -> list[list[tuple[float, TorchMemory]]]:
    """The samples of each process that used a GPU, in the order of time; a torn line at the end is left out.

    Raises:
        ConfigError: a line is no sample.
    """
    found = []
    for file in sorted(place.glob("memory-*.jsonl")):
        text = file.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            samples = [_sample_of(json.loads(line)) for line in lines]
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{file} has a line that is no sample of memory") from None
        found += [samples] if samples else []
    return found


def _sample_of(entry: dict[str, Any]) -> tuple[float, TorchMemory]:
    return float(entry["time"]), TorchMemory(**{one.name: float(entry[one.name]) for one in fields(TorchMemory)})


def at(samples: Sequence[Sequence[tuple[float, TorchMemory]]], moment: float) -> TorchMemory | None:
    """All processes' last samples up to a moment, together; None if one has none of the last `STALE` seconds then.

    Args:
        samples: from `read_samples`.
        moment: seconds since 1970.
    """
    last = [[sample for taken, sample in own if moment - STALE <= taken <= moment][-1:] for own in samples]
    if not last or not all(last):
        return None
    rows = [asdict(one) for (one,) in last]
    return TorchMemory(**{name: round(sum(row[name] for row in rows), 2) for name in rows[0]})
