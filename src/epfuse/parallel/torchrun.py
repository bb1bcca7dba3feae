"""This process as one of the ranks that torchrun started, on one machine or several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from epfuse.errors import ConfigError
from epfuse.parallel.group import EPGroup
from epfuse.parallel.guard import LIMIT_SECONDS, Guard, Keeper
from epfuse.parallel.launch import COLLECTIVE_LIMIT, Placement, RankContext

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and torch.distributed's ``env://`` reads."""


@contextmanager
def torchrun_ranks(limit: float = LIMIT_SECONDS) -> Iterator[RankContext]:
    """Join the group of all ranks, guarded (`epfuse.parallel.guard`), and leave it in the end.

    A rank has the GPU of its number on its machine and NCCL (RCCL); where there are fewer GPUs than ranks they share
    them, and where there are none they are on the CPU; both talk through gloo.

    Args:
        limit: seconds for which a rank may hold the others.

    Yields:
        The group, whose ``waiting`` is the guard's, and this rank's device.

    Raises:
        ConfigError: torchrun has not started this process.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment has no {missing[0]}; start this with torchrun: torchrun --nproc-per-node 2 -m epfuse ..."
        )
    local_rank, local_size = (_number(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    placement = Placement.choose(local_size)
    device = placement.device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # or a GPU that fails because another one's rank is gone makes torch abort, before anybody is named
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_LIMIT))
    dist.init_process_group(
        placement.backend,
        store=PrefixStore("epfuse-group", store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_LIMIT,
        device_id=device if placement is Placement.GPU_EACH else None,
    )
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    name = f"{'torchrun' if agent else f'rank 0 of {size}'}, which keeps the store on {os.environ['MASTER_ADDR']},"
    with Guard(store, rank, size, Keeper(name, here=rank == 0 and not agent), limit) as guard:
        yield RankContext(replace(EPGroup.current(), waiting=guard.waiting), device)
        with guard.waiting():
            dist.barrier()
    dist.destroy_process_group()


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text!r}; torchrun sets it to a number")
    return int(text)
