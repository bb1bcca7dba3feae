"""Run one function on P ranks of this machine, started by torchrun's API."""

from __future__ import annotations

import enum
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.parallel.group import EPGroup
from epfuse.target import target_of


class Placement(enum.Enum):
    """Where the ranks of one machine run and how they talk."""

    CPU = "cpu"
    """Every rank on the CPU, gloo."""
    GPU_EACH = "gpu each"
    """One GPU a rank, NCCL or RCCL."""
    GPU_SHARED = "gpu shared"
    """Fewer GPUs than ranks: they take turns on them; gloo through host memory, since NCCL refuses to share a GPU."""

    @classmethod
    def choose(cls, ranks: int) -> Placement:
        """The best placement of ``ranks`` ranks on this machine; GPUs that epfuse has no kernels for don't count."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            try:
                target_of(torch.device("cuda", 0))
            except UnsupportedTarget:
                gpus = 0
        if gpus >= ranks:
            return cls.GPU_EACH
        return cls.GPU_SHARED if gpus else cls.CPU

    @property
    def backend(self) -> str:
        """torch.distributed's name of the backend."""
        return "nccl" if self is Placement.GPU_EACH else "gloo"

    def device(self, rank: int) -> torch.device:
        """The device of a rank."""
        if self is Placement.CPU:
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())


@dataclass(frozen=True)
class RankContext:
    """What a rank's function gets to know about where it runs."""

    group: EPGroup
    device: torch.device


class RankFailed(RuntimeError):
    """A rank raised or died; the message names the rank and its error."""


def launch_ranks(
    entry: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    ranks: int,
    placement: Placement,
    log_dir: Path,
    preload: tuple[str, ...] = (),
) -> list[Any]:
    """Call ``entry(context, *args)`` on every rank and return what each returned, by rank.

    Each rank is a process with a default process group over 127.0.0.1 (rendezvous on a free port), one CPU thread, and
    its stdout and stderr in files under ``log_dir``, so that a launcher's own stdout stays clean.

    Args:
        entry: a module-level function; its results must be plain values (they come back through a queue).
        args: arguments after the context, picklable.
        ranks: P.
        placement: devices and backend.
        log_dir: an existing folder for the ranks' output.
        preload: modules that the ranks import; on the CPU they are imported once, in the server that forks the ranks.

    Raises:
        ConfigError: ``ranks`` is below 1.
        RankFailed: a rank raised or died; the others are stopped.
    """
    if ranks < 1:
        raise ConfigError(f"ranks is {ranks}; it must be at least 1")
    # Importing torch and a model library costs seconds of CPU per process. A fork server pays once; on a GPU it is not
    # safe, because an import may touch the driver and a forked process can't use that.
    start_method = "forkserver" if placement is Placement.CPU else "spawn"
    if start_method == "forkserver":
        set_forkserver_preload(["epfuse.parallel.launch", *preload])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        role="ep",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir), redirects=Std.ALL),
    )
    try:
        results = elastic_launch(config, _run_rank)(entry, args, placement, log_dir)
    except ChildFailedError as error:
        raise RankFailed(_first_failure(log_dir, ranks, error)) from error
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error
    return [results[rank] for rank in range(ranks)]


def _run_rank(entry: Callable[..., Any], args: tuple[Any, ...], placement: Placement, log_dir: Path) -> Any:
    # P ranks share the machine's cores: more than one thread each only makes them fight
    torch.set_num_threads(1)
    dist.init_process_group(placement.backend)
    try:
        group = EPGroup.current()
        device = placement.device(group.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return entry(RankContext(group, device), *args)
    except Exception as error:
        rank = dist.get_rank()
        note = {"time_ns": time.time_ns(), "rank": rank, "error": f"{type(error).__name__}: {error}"}
        (log_dir / f"error-{rank}.json").write_text(json.dumps(note))
        raise
    finally:
        dist.destroy_process_group()


def _first_failure(log_dir: Path, ranks: int, error: ChildFailedError) -> str:
    """The error that came first, which is the cause: the other ranks fail for want of the first one.

    torchrun's own record has whole seconds only; ranks leave a note with the time before they leave the group. A rank
    that a signal ended has no time for that, and then torchrun knows better.
    """
    rank, failure = error.get_first_failure()
    what = failure.message
    notes = [json.loads(path.read_text()) for path in log_dir.glob("error-*.json")]
    if notes and failure.exitcode >= 0:
        first = min(notes, key=lambda note: note["time_ns"])
        rank, what = first["rank"], first["error"]
    return f"rank {rank} of {ranks} failed: {what}"
