"""From paths by token count to decisions by token count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.config import Path
from epfuse.families.family import CallKind
from epfuse.families.registry import READABLE
from epfuse.policy.call import call_table, considered_paths, path_refusals, why_not
from epfuse.policy.layer import LayerRequest, Storage, TokenRange

MOST_TOKENS = 2**31 - 1
"""T*K of a call stays below 2**31."""


@checks_enums
@dataclass(frozen=True)
class Route:
    """A path for the token counts up to a bound.

    Attributes:
        max_tokens: the last T; None for no end.
        path: what runs; AUTO for the best of what is stored.
        reason: one sentence.
        passed_over: one sentence for kernels that could run on the same weights and are not taken; None for `decide`'s
            own.
    """

    max_tokens: int | None
    path: Path
    reason: str
    passed_over: str | None = None


@checks_enums
def token_ranges(request: LayerRequest, storage: Storage, routes: Sequence[Route]) -> tuple[TokenRange, ...]:
    """Every route with its tiles: a range ends where the path or the tiles change.

    Args:
        request: the layer.
        storage: what it keeps.
        routes: ascending; the last one has no end.

    Raises:
        UnsupportedTarget: the target has no kernel for one of the paths on ``storage``.
    """
    return _ranges(request.calls(storage), tuple(routes))


@functools.lru_cache(maxsize=1024)  # a model's layers are alike
def _ranges(kind: CallKind, routes: tuple[Route, ...]) -> tuple[TokenRange, ...]:
    refusals = path_refusals(kind)
    found: list[TokenRange] = []
    first = 1
    for route in routes:
        table = call_table(replace(kind, path=route.path))
        last = MOST_TOKENS if route.max_tokens is None else route.max_tokens
        starts = [first, *(start for start in table.first_tokens if first < start <= last)]
        for start, after in zip(starts, [*starts[1:], None], strict=True):
            decision = table.at(start)
            passed_over = {path: why_not(path, Path.AUTO, decision.path) for path in refusals}
            if route.passed_over is not None:
                passed_over |= {path: route.passed_over for path in READABLE[kind.target]}
            considered = considered_paths(decision.path, route.reason, refusals, passed_over)
            end = route.max_tokens if after is None else after - 1
            found.append(TokenRange(start, end, replace(decision, considered=considered)))
        first = last + 1
    return tuple(found)
