"""Where a step's layers begin and end.

A layer is what repeats: the kernels that occur as often as each other, and always in the same order, are a layer's
skeleton, whatever their vendor calls them. Layers may differ in all other kernels (two attention variants in turn, a
cast that the first layer lacks), and some layers may lack part of the skeleton (dense layers before the MoE ones).
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from epfuse.profiling.events import Range, TracedKernel
from epfuse.profiling.phases import Phase

MOST_ANCHORS = 8
"""Kernels of one count that are tried as the one to which the others are compared."""

MODULE_LAYER = re.compile(r"^nn\.Module: \w*Layer_\d+$")
"""A transformer layer's own module in a trace with stacks (DecoderLayer_3)."""

FEW_EXTRA = 1.5
"""A model has at most this many times as many layers as MoE layers, else the longer repetition is no layer."""


@dataclass(frozen=True)
class Layers:
    """Layers of one step as index ranges into its kernels, in order, without overlap.

    Attributes:
        spans: ``range(first, last + 1)`` a layer.
        found_by: ``modules``, ``repetition`` or ``nothing``.
    """

    spans: list[range] = field(default_factory=list)
    found_by: str = "nothing"

    def around(self, index: int) -> range | None:
        """The layer of a kernel."""
        at = bisect.bisect_right(self.spans, index, key=lambda span: span.start) - 1
        return self.spans[at] if at >= 0 and index in self.spans[at] else None

    def position(self, index: int) -> str | None:
        """``head``, ``layer`` or ``tail``; None if there are no layers."""
        if not self.spans:
            return None
        if index < self.spans[0].start:
            return "head"
        return "tail" if index >= self.spans[-1].stop else "layer"


@dataclass(frozen=True)
class Skeleton:
    """Names that each occur once a layer.

    Attributes:
        starts: positions of the first one of each layer.
        ends: positions of the last one of each layer.
        size: how many there are.
    """

    starts: list[int]
    ends: list[int]
    size: int


def find_layers(
    kernels: Sequence[TracedKernel], ranges: Sequence[tuple[Range, ...]], phases: Sequence[Phase | None]
) -> Layers:
    """The layers of one step on one device.

    Args:
        kernels: in order of start.
        ranges: for each the host ranges around its launch.
        phases: what is known so far; two kernels of one phase may stand for each other at a layer's edge.
    """
    spans = _by_modules(ranges)
    if len(spans) > 1:
        return Layers(spans, "modules")
    stream = busiest_stream(kernels)
    indices = [index for index, kernel in enumerate(kernels) if kernel.stream == stream]
    names = [kernels[index].name for index in indices]
    skeleton = find_skeleton(names)
    if skeleton is None:
        return Layers()
    keys = [phases[index] or kernels[index].name for index in indices]
    # other streams' kernels follow by time, up to the next layer's first kernel in this one
    places = [*indices, len(kernels)]
    edges = [places[position] for position in _edges(keys, skeleton)]
    return Layers([range(a, b) for a, b in pairwise(edges)], "repetition")


def busiest_stream(kernels: Sequence[TracedKernel]) -> int:
    """The stream with the most kernel time: layers are sought in it, other streams follow by time."""
    busy: dict[int, int] = defaultdict(int)
    for kernel in kernels:
        busy[kernel.stream] += kernel.duration
    return max(busy, key=lambda stream: (busy[stream], -stream))


def find_skeleton(names: Sequence[str]) -> Skeleton | None:
    """The largest set of names that repeat together, once a turn and in one order; None if fewer than two do."""
    places: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        places[name].append(position)
    by_count: dict[int, list[list[int]]] = defaultdict(list)
    for positions in places.values():
        if len(positions) > 1:
            by_count[len(positions)].append(positions)
    best: dict[int, list[list[int]]] = {}
    for count, group in by_count.items():
        sets = [[other for other in group if _take_turns(anchor, other)] for anchor in group[:MOST_ANCHORS]]
        best[count] = max(sets, key=len)
    candidates = [count for count, members in best.items() if len(members) > 1]
    if not candidates:
        return None
    chosen = max(candidates, key=lambda count: (len(best[count]), count))
    for count in sorted(candidates, reverse=True):
        if chosen < count <= FEW_EXTRA * chosen and _at_most_once(best[chosen][0], best[count][0]):
            chosen = count
            break
    members = sorted(best[chosen])
    first = members[0]
    # One that comes before `first` in its own turn would begin with the second turn's.
    same_turn = [positions for positions in members if positions[0] < first[1] and _take_turns(first, positions)]
    return Skeleton(first, max(same_turn, key=lambda positions: positions[0]), len(members))


def _take_turns(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether a, b, a, b, ... or b, a, b, a, ... (or a is b)."""
    if a is b:
        return True
    first, second = (a, b) if a[0] < b[0] else (b, a)
    return all(x < y for x, y in zip(first, second, strict=True)) and all(
        y < x for y, x in zip(second, first[1:], strict=False)
    )


def _at_most_once(inner: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether each turn of ``outer`` has at most one of ``inner``."""
    turns = [bisect.bisect_right(outer, position) for position in inner]
    return len(set(turns)) == len(turns)


def _edges(keys: Sequence[object], skeleton: Skeleton) -> list[int]:
    """First position of each layer, and the position behind the last layer.

    What stands before every layer's skeleton, the first one's included (its input norm), begins the layer. The rest of
    what stands between two skeletons ends the earlier one, and so does as much of it as follows the last layer.
    """
    starts, ends = skeleton.starts, skeleton.ends
    longest = min(starts[0], *(b - a - 1 for a, b in pairwise(starts)))
    lead = 0
    while lead < longest and len({keys[start - 1 - lead] for start in starts}) == 1:
        lead += 1
    between = [start - end - 1 for end, start in zip(ends, starts[1:], strict=False)]
    if lead > min(between):  # a skeleton's end is the next layer's beginning: what follows the last layer is its own
        return [start - lead for start in starts] + [ends[-1] + 1 - (lead - min(between))]
    longest = min(len(keys) - ends[-1] - 1, *(room - lead for room in between))
    trail = 0
    while trail < longest and len({keys[end + 1 + trail] for end in ends}) == 1:
        trail += 1
    return [start - lead for start in starts] + [ends[-1] + 1 + trail]


def _by_modules(ranges: Sequence[tuple[Range, ...]]) -> list[range]:
    """Runs of kernels that were launched in the same layer module."""
    spans: list[range] = []
    current: Range | None = None
    for index, around in enumerate(ranges):
        module = next((item for item in around if MODULE_LAYER.match(item.name)), None)
        if module is None:
            continue
        if module is current:
            spans[-1] = range(spans[-1].start, index + 1)
        else:
            spans.append(range(index, index + 1))
            current = module
    return spans
