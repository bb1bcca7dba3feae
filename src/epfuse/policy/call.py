"""Which kernels a call runs on the weights that are kept: a table over T, made once and looked up ever after."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from epfuse.arguments import checks_enums, integer
from epfuse.config import Bias, Combine, Path, SwiGLUOAI
from epfuse.errors import UnsupportedTarget
from epfuse.families.family import CallKind
from epfuse.families.registry import FP8_PATHS, READABLE, family_of, readable_formats, takes_beside_fp8
from epfuse.policy.decision import Considered, Decision, PathVerdict
from epfuse.policy.tiles import log_sources, tile_ranges
from epfuse.target import Target


@dataclass(frozen=True)
class CallTable:
    """Decisions by token count.

    Attributes:
        first_tokens: where each decision begins, ascending, the first is 1.
        decisions: one for each.
    """

    first_tokens: tuple[int, ...]
    decisions: tuple[Decision, ...]

    def at(self, tokens: int) -> Decision:
        """The decision for T tokens; the same object every time."""
        return self.decisions[bisect_right(self.first_tokens, tokens) - 1]


def decide(kind: CallKind, tokens: int) -> Decision:
    """Resolve AUTO, then choose weights and tiles.

    Args:
        kind: of the call.
        tokens: T, at least 1.

    Raises:
        ConfigError: ``tokens`` is no integer or out of range.
        UnsupportedTarget: the target can't run the path so; the message names what it can run.
    """
    return call_table(kind).at(integer("tokens", tokens, least=1))


@functools.lru_cache(maxsize=1024)
def table_of(*kind: Any) -> CallTable:
    """`running_table` of ``CallKind(*kind)``: `fused_experts` asks it at each call, and makes no object for it."""
    return running_table(CallKind(*kind))


def running_table(kind: CallKind) -> CallTable:
    """`call_table` of calls that are about to run: where their tiles are from is logged, once.

    Args:
        kind: of the calls.

    Raises:
        UnsupportedTarget: as `call_table`.
    """
    table = call_table(kind)
    first = table.decisions[0]
    if first.weights is not None:
        sources = zip(table.first_tokens, (decision.tile_source for decision in table.decisions), strict=True)
        log_sources(kind.on(first.path, first.weights), sources)
    return table


@functools.lru_cache(maxsize=1024)
def call_table(kind: CallKind) -> CallTable:
    """All of `decide`'s answers that differ in T alone; the same object for the same kind of calls.

    Args:
        kind: of the calls.

    Raises:
        UnsupportedTarget: the target can't run the path so; the message names what it can run.
    """
    path, target = kind.path, kind.target
    refusals = path_refusals(kind)
    kernels = [candidate for candidate in READABLE[target] if refusals[candidate] is None]
    runs = [*kernels, Path.REFERENCE] if refusals[Path.REFERENCE] is None else kernels
    chosen = path
    if path is Path.AUTO and (kernels or not target.is_gpu):  # a GPU never falls back to plain PyTorch by itself
        chosen = runs[0] if runs else path
    if chosen not in runs:
        raise UnsupportedTarget(
            f"path {path.value!r} has no kernel for {target.value} with"
            f" {_described(kind)}; it can run"
            f" {', '.join(p.value for p in runs) or 'nothing so'}"
        )
    reason = "The caller asked for it." if path is chosen else _why_auto(chosen, target)
    passed_over = {other: why_not(other, path, chosen) for other in runs}
    considered = considered_paths(chosen, reason, refusals, passed_over)
    if chosen is Path.REFERENCE:
        return CallTable((1,), (Decision(chosen, considered=considered),))
    weights = next(form for form in readable_formats(replace(kind, path=chosen)) if form in kind.formats)
    ranges = tile_ranges(kind.on(chosen, weights))
    return CallTable(
        tuple(first for first, _ in ranges),
        tuple(
            Decision(
                chosen,
                family_of(chosen, weights, choice.tiles),
                weights,
                choice.tiles,
                choice.source,
                choice.measured_us,
                considered,
            )
            for _, choice in ranges
        ),
    )


def path_refusals(kind: CallKind) -> dict[Path, str | None]:
    """Every path with the sentence that says why calls that differ in it can't run; None for one that can."""
    return {path: _refusal(replace(kind, path=path)) for path in Path if path is not Path.AUTO}


@checks_enums
def considered_paths(
    chosen: Path, reason: str, refusals: Mapping[Path, str | None], passed_over: Mapping[Path, str]
) -> tuple[Considered, ...]:
    """The path that is taken, and every other one.

    Args:
        chosen: what is taken.
        reason: for it.
        refusals: as `path_refusals` gives them.
        passed_over: why a path that could run is not taken.
    """
    others = [path for path in refusals if path is not chosen]
    return (
        Considered(chosen, PathVerdict.TAKEN, reason),
        *(Considered(path, PathVerdict.REFUSED, refusals[path] or passed_over[path]) for path in others),
    )


def _refusal(kind: CallKind) -> str | None:
    path, formats, plain = kind.path, kind.formats, replace(kind, bias=Bias.NONE)
    if kind.combine is Combine.ATOMIC and path not in FP8_PATHS:
        return "It does not sum routes by atomics."
    if path is Path.REFERENCE:
        return None
    readable = readable_formats(replace(plain, activation=SwiGLUOAI))
    if not readable:
        return f"It has no kernel for {kind.target.value}."
    if not formats.intersection(readable):
        kept = ", ".join(sorted(form.value for form in formats))
        return f"It reads {' or '.join(form.value for form in readable)}; what is kept is {kept}."
    if not formats.intersection(readable_formats(plain)):
        return f"It has no code for {kind.activation.__name__}."
    if not formats.intersection(readable_formats(kind)):
        return "It adds no biases."
    if path is not Path.BF16 and not takes_beside_fp8(kind):
        return f"It takes BF16 activations, not {str(kind.dtype).removeprefix('torch.')}."
    return None


def _why_auto(chosen: Path, target: Target) -> str:
    """Why AUTO became ``chosen``."""
    if chosen is Path.REFERENCE:
        return f"It is what {target.value} runs."
    if chosen in FP8_PATHS:
        return f"Nothing that keeps the activations in BF16 runs so on {target.value}."
    return f"Of what runs on {target.value} with these weights it reads the fewest bytes and keeps activations in BF16."


@checks_enums
def why_not(path: Path, asked: Path, chosen: Path) -> str:
    """Why a path that could run is not taken, in a sentence."""
    if path is Path.REFERENCE:
        return "Plain PyTorch is the oracle of the kernels, and slow."
    if asked is not Path.AUTO:
        return f"The caller asked for {chosen.value}."
    if path in FP8_PATHS and chosen not in FP8_PATHS:
        return f"It rounds activations to FP8, which {chosen.value} does not."
    if path is Path.BF16:
        return f"It reads twice the bytes of {chosen.value}, for the same products."
    return f"{chosen.value} comes first."


def _described(kind: CallKind) -> str:
    """What of a call decides which paths can run."""
    text = f"weights in {', '.join(sorted(form.value for form in kind.formats))}"
    if kind.dtype != torch.bfloat16:
        text += f", activations in {str(kind.dtype).removeprefix('torch.')}"
    if kind.combine is not Combine.DETERMINISTIC:
        text += f", combine {kind.combine.value!r}"
    if kind.activation is not SwiGLUOAI:
        text += f", activation {kind.activation.__name__}"
    if kind.bias is not Bias.NONE:
        text += ", biases"
    return text
