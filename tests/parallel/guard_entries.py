"""What guarded ranks do in tests: module-level, so that another process finds it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

import epfuse
from epfuse import ExpertMap, ExpertWeights
from epfuse.errors import ConfigError
from epfuse.parallel.agreement import RanksDisagree, agree_on_layer, check_agreement
from epfuse.parallel.exchange import Dispatch
from epfuse.parallel.launch import RankContext
from epfuse.parallel.placement import ExpertPlacement
from epfuse.parallel.torchrun import torchrun_ranks
from tests.parallel.entries import misdeed

LIMIT = 2.0
"""Seconds for which a rank of these tests may hold the others."""


def guarded(rank: int, ranks: int, port: int, folder: Path, victim: int, how: str) -> None:
    """Sum five times, as a rank that torchrun started; before the third sum the victim does what ``how`` says."""
    become_rank(rank, ranks, port, folder)
    with torchrun_ranks(LIMIT) as context:
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        for step in range(5):
            if rank == victim and step == 2:
                misdeed(how)
            total = context.group.all_reduce(torch.ones(1))
        (folder / f"result-{rank}").write_text(str(total.item()))


def become_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    """What torchrun gives a rank, but for its store; what it says goes into files."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT, 0o600), stream)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def disagree(context: RankContext) -> dict[str, str]:
    """Every kind of disagreement, one after another: kind -> what this rank was told."""
    group, told = context.group, {}
    rank, odd = group.rank, group.rank == 1
    placement = ExpertPlacement.contiguous(6, group.size)
    own = placement.expert_map(rank)
    dense = weights_of(2)
    slots = own.on(torch.device("cpu")).clone()
    gap = ExpertMap(torch.where(slots == 1, -1, slots)) if odd else own
    twice = ExpertMap(ExpertPlacement.contiguous(6, group.size).expert_map(0).on(torch.device("cpu"))) if odd else own
    copied = ExpertPlacement(tuple((own, 0) for own in range(group.size)))  # expert 0 everywhere
    bent = weights_of(2)
    if odd and bent.dense_experts is not None:
        bent.dense_experts.w13[1, 0, 0] = 7.0
    biased, one_bias = (replace(dense, down_bias=torch.full((2, 32), 0.5)) for _ in range(2))
    if one_bias.down_bias is not None and odd:
        one_bias.down_bias[1, 5] = 0.25
    doubled = ExpertPlacement(((0, 0), (1, 2), (3, 4)))  # expert 0 twice on one rank
    stacked = weights_of(2)
    if rank == 0 and stacked.dense_experts is not None:
        stacked.dense_experts.w2[1, 3, 3] = 7.0
    ungated = ExpertWeights.dense(torch.ones(2, 32, 32), torch.ones(2, 32, 32))
    cases = {
        "nothing": (dense, own, {}, None),
        "H": (weights_of(2, hidden=64) if odd else dense, own, {}, None),
        "I": (weights_of(2, intermediate=64) if odd else dense, own, {}, None),
        "dtype": (weights_of(2, dtype=torch.bfloat16) if odd else dense, own, {}, None),
        "format": (ExpertWeights.quantize(dense) if odd else dense, own, {}, None),
        "biases": (dense if odd else biased, own, {}, None),
        "gate": (ungated if odd else dense, own, {}, None),
        "experts": (dense, ExpertMap.contiguous(8, group.size, rank) if odd else own, {}, None),
        "checkpoint": (dense, own, {"checkpoint": f"revision {int(odd)}"}, None),
        "an expert on two ranks": (dense, twice, {}, None),
        "an expert on none": (dense, gap, {}, None),
        "another placement": (dense, own, {}, ExpertPlacement.strided(6, group.size) if odd else placement),
        "a map of another placement": (dense, ExpertPlacement.strided(6, group.size).expert_map(rank), {}, placement),
        "copies": (bent, copied.expert_map(rank), {}, copied),
        "copies on one rank": (stacked, doubled.expert_map(rank), {}, doubled),
        "more weights than the map": (weights_of(3) if odd else dense, own, {}, placement),
        "activations": (
            dense,
            own,
            Dispatch(group, placement, 4).facts(torch.float16 if odd else torch.bfloat16, 2),
            None,
        ),
        "room": (dense, own, Dispatch(group, placement, 4 + odd).facts(torch.bfloat16, 2), None),
        "copies of biases": (one_bias, copied.expert_map(rank), {}, copied),
    }
    for kind, arguments in cases.items():
        weights, expert_map, facts, placed = arguments
        try:
            agree_on_layer(group, weights, expert_map, facts, placed)
            told[kind] = ""
        except RanksDisagree as error:
            told[kind] = str(error)
    try:
        agree_on_layer(group, dense, own, {"weights": "a checkpoint"})
    except ConfigError as error:
        told["a fact in place of another"] = str(error)
    before = epfuse.__version__
    epfuse.__version__ = "0.0.1" if odd else before
    try:
        agree_on_layer(group, dense, own, {})
    except RanksDisagree as error:
        told["version"] = str(error)
    epfuse.__version__ = before
    try:
        check_agreement(group, {"room": str(rank)})
    except RanksDisagree as error:
        told["all different"] = str(error)
    # the group goes on: whoever was told has left no collective half done
    total = replace(group).all_reduce(torch.ones(1))
    return told | {"sum": str(total.item())}


def weights_of(
    local: int, hidden: int = 32, intermediate: int = 32, dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    return ExpertWeights.dense(
        torch.ones(local, 2 * intermediate, hidden, dtype=dtype), torch.ones(local, hidden, intermediate, dtype=dtype)
    )
