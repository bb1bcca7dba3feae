"""Ranks compare what they hold before they compute: one that has something else is named, and nothing is summed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

import epfuse
from epfuse.errors import ConfigError, EpfuseError
from epfuse.expert_map import ExpertMap
from epfuse.parallel.group import EPGroup
from epfuse.parallel.placement import ExpertPlacement
from epfuse.weights.experts import ExpertWeights

DIGEST = hashlib.sha256
LONGEST = 1 << 26
"""Bytes of a text that a rank sends; a map of 2**24 experts has more, and no model has so many."""


class RanksDisagree(EpfuseError):
    """The ranks of a group hold parts of different layers; the message names the ranks and what they differ in.

    Fix: give every rank the same checkpoint, configuration and version of epfuse.
    """


def check_agreement(group: EPGroup, facts: Mapping[str, str]) -> None:
    """Refuse on every rank, with the same words, if a rank has other facts than the rest. A collective.

    Every call compares hashes; only if they differ do the facts themselves travel.

    Args:
        group: the ranks.
        facts: what must be equal everywhere, by name.

    Raises:
        RanksDisagree: names each rank that differs from most, the fact, and both values; of as many on both sides, all.
    """
    text = json.dumps(dict(facts), sort_keys=True)
    own = torch.frombuffer(bytearray(DIGEST(text.encode()).digest()), dtype=torch.uint8)
    every = group.start_all_gather(own.to(group.device)).finish().view(group.size, -1)
    if bool((every == every[0]).all()):
        return
    told = [json.loads(one) for one in gather_text(group, text)]
    faults = []
    for name in sorted({name for facts_of_one in told for name in facts_of_one}):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, facts_of_one in enumerate(told):
            ranks_by_value.setdefault(facts_of_one.get(name, "nothing"), []).append(rank)
        if len(ranks_by_value) > 1:
            faults.append(_difference(name, ranks_by_value, group.size))
    raise RanksDisagree("; ".join(faults))


def agree_on_layer(
    group: EPGroup,
    weights: ExpertWeights,
    expert_map: ExpertMap,
    facts: Mapping[str, str],
    placement: ExpertPlacement | None = None,
) -> None:
    """Refuse on every rank if the ranks' shards don't make one layer. A collective; once, after loading.

    Versions of epfuse and torch, sizes, dtype and format must be equal, and which biases there are; every expert must
    be on exactly one rank, and a rank's weights be of as many experts as its map. Where an expert has copies, on one
    rank or several, the bytes of their weights and biases must be equal.

    Args:
        group: the ranks.
        weights: of this rank.
        expert_map: of this rank.
        facts: what else must be equal: the activation, a checkpoint's name and revision, an exchange's `facts`.
        placement: where experts have copies; the map is then one of physical ids.

    Raises:
        ConfigError: a fact has the name of one that is compared anyway, and would stand in its place.
        RanksDisagree: names the ranks and what they differ in.
    """
    own = {
        "epfuse": epfuse.__version__,
        "torch": str(torch.__version__),
        "H": str(weights.hidden),
        "I": str(weights.intermediate),
        "gate": "yes" if weights.inputs == 2 else "no",
        "biases": " and ".join(name for name, _ in weights.biases) or "none",
        "experts": str(expert_map.num_experts),
        "weights": ", ".join(f"{form.value} {_dtype(weights)}" for form in weights.kept),
        "placement": "" if placement is None else str(placement.held),
    }
    for name in facts:
        if name in own:
            raise ConfigError(f"facts has {name!r}, which is compared anyway; give it another name")
    check_agreement(group, own | dict(facts))
    slots = expert_map.on(torch.device("cpu")).tolist()
    told = [json.loads(text) for text in gather_text(group, json.dumps([weights.local_experts, slots]))]
    maps = [slots_of_one for _, slots_of_one in told]
    faults = [
        f"rank {rank} has weights of {held} experts and an expert map of {mapped}"
        for rank, (held, slots_of_one) in enumerate(told)
        if held != (mapped := sum(slot >= 0 for slot in slots_of_one))
    ]
    for expert, held in enumerate(zip(*maps, strict=True)):
        ranks = [rank for rank, slot in enumerate(held) if slot >= 0]
        if len(ranks) != 1:
            what = f"ranks {', '.join(map(str, ranks))}, so it would count {len(ranks)} times" if ranks else "no rank"
            faults.append(f"expert {expert} of the expert maps is on {what}")
    if placement is not None:
        faults += _wrong_places(group, placement, maps)
        faults = faults or _different_copies(group, weights, placement)
    if faults:
        more = f"; {len(faults) - 3} more" if len(faults) > 3 else ""
        raise RanksDisagree("; ".join(faults[:3]) + more)


def gather_text(group: EPGroup, text: str) -> list[str]:
    """Every rank's text, by rank. A collective, with a host sync.

    Raises:
        RanksDisagree: a text is longer than `LONGEST`.
    """
    data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
    longest = group.largest(torch.tensor(data.numel(), device=group.device))
    if longest > LONGEST:
        raise RanksDisagree(f"a rank's text has {longest} bytes; at most {LONGEST} are compared")
    padded = torch.nn.functional.pad(data, (0, longest - data.numel())).to(group.device)
    every = group.start_all_gather(padded).finish().cpu().view(group.size, -1)
    return [bytes(row.tolist()).partition(b"\0")[0].decode() for row in every]


def _difference(name: str, ranks_by_value: dict[str, list[int]], size: int) -> str:
    """Who differs from whom: those from most where there are most."""
    value, most = max(ranks_by_value.items(), key=lambda item: len(item[1]))
    if 2 * len(most) > size:
        others = [f"{_ranks(ranks)} has {other!r}" for other, ranks in ranks_by_value.items() if other != value]
        return f"{name}: {', '.join(others)}; the others have {value!r}"
    return f"{name}: " + ", ".join(f"{_ranks(ranks)} has {found!r}" for found, ranks in ranks_by_value.items())


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of the ranks {', '.join(map(str, ranks))}"


def _dtype(weights: ExpertWeights) -> str:
    return str(weights.dense_experts.w13.dtype) if weights.dense_experts else ""


def _wrong_places(group: EPGroup, placement: ExpertPlacement, maps: list[list[int]]) -> list[str]:
    found = []
    for rank in range(group.size):
        if maps[rank] != placement.expert_map(rank).on(torch.device("cpu")).tolist():
            found.append(f"rank {rank}'s expert map is not the placement's")
    return found


def _different_copies(group: EPGroup, weights: ExpertWeights, placement: ExpertPlacement) -> list[str]:
    """Experts whose copies have different bytes."""
    own: dict[str, list[str]] = {}
    for slot, expert in enumerate(placement.held[group.rank]):
        if len(placement.copies[expert]) > 1:
            digest = DIGEST()
            kept = [part for experts in weights.formats for part in experts.tensors()]
            for _, tensor in (*kept, *weights.biases):
                digest.update(tensor[slot].contiguous().view(torch.uint8).cpu().numpy().tobytes())
            own.setdefault(str(expert), []).append(digest.hexdigest())
    found: dict[str, dict[str, list[int]]] = {}
    for rank, text in enumerate(gather_text(group, json.dumps(own))):
        for expert_name, values in json.loads(text).items():
            for value in dict.fromkeys(values):
                found.setdefault(expert_name, {}).setdefault(value, []).append(rank)
    return [
        f"copies of expert {expert} have different weights or biases: "
        + ", ".join(f"rank {'+'.join(map(str, ranks))} {value[:8]}" for value, ranks in values.items())
        for expert, values in found.items()
        if len(values) > 1
    ]
