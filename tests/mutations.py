"""Seeded mutations of valid JSON files, for fuzzing their readers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "²", "x" * 5000,
    "\ud800", "\x1b[2J", "nan", "12", [], {}, [[]], {"": None}, [1, "a"],
]  # fmt: skip


def mutated_values(values: Any, count: int, seed: int) -> Iterator[bytes]:
    """``values`` as JSON with one to three places changed: replaced, dropped, doubled, or taken from elsewhere."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(values)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _mutate(changed, rng)
        yield json.dumps(changed).encode()


def mutated_bytes(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """``data`` cut off, with bytes changed, or with a piece put in twice."""
    rng = random.Random(seed)
    for number in range(count):
        at = rng.randrange(len(data))
        yield [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at : at + rng.randrange(1, 200)] + data[at:],
            data[:at] + b"[" * 100_000 + data[at:],
        ][number % 4]


def _mutate(values: Any, rng: random.Random) -> None:
    places = [
        (node, key) for node in _nodes(values) for key in (list(node) if isinstance(node, dict) else range(len(node)))
    ]
    if not places:
        return
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, place = rng.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            node[key] = copy.deepcopy(other[place])
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(("", "more", "²", "1", f"{key} "))] = copy.deepcopy(node[key])
    elif kind == 2:
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(STRANGE))


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _nodes(child)
