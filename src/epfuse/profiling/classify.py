"""Kernels to phases by rules: first by what a kernel is called, then by what stands around it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epfuse.profiling.events import Kernel
from epfuse.profiling.layers import Layers
from epfuse.profiling.phases import Phase
from epfuse.profiling.rules import Rule, RuleSet

ROUNDS = 6
"""A kernel that one round classified may let the next one classify its neighbour; chains are short."""

JOINED_BY = " > "


@dataclass
class Verdicts:
    """For each kernel its phase and the index of the rule that decided; None where none did."""

    phases: list[Phase | None]
    rules: list[int | None]


class Classifier:
    """Applies one rule set; what it finds out about a name is kept for the next step.

    Args:
        rules: in the order in which they are tried.
    """

    def __init__(self, rules: RuleSet) -> None:
        self.rules = rules
        self._by_name: dict[str, list[int]] = {}
        self._glue: dict[str, bool] = {}
        self._searched: dict[tuple[re.Pattern[str], str], bool] = {}

    def by_name(self, kernels: Sequence[Kernel], ranges: Sequence[str]) -> Verdicts:
        """What names, ranges and neighbours' names tell, whatever the phases of others.

        Args:
            kernels: of one step on one device, in order of start.
            ranges: for each kernel the names of the ranges around its launch, joined by `` > ``.
        """
        verdicts = Verdicts([None] * len(kernels), [None] * len(kernels))
        previous, following = self._neighbours(kernels)
        for index, kernel in enumerate(kernels):
            for number in self._candidates(kernel.name):
                rule = self.rules.rules[number]
                if (
                    not rule.needs_phases
                    and self._matches(rule.range, ranges[index])
                    and self._matches(rule.previous, previous[index])
                    and self._matches(rule.next, following[index])
                ):
                    verdicts.phases[index], verdicts.rules[index] = rule.phase, number
                    break
        return verdicts

    def by_context(self, kernels: Sequence[Kernel], ranges: Sequence[str], layers: Layers, verdicts: Verdicts) -> None:
        """Classify what `by_name` left, rule by rule, until nothing changes. Changes ``verdicts``."""
        previous, following = self._neighbours(kernels)
        streams: dict[int, list[int]] = defaultdict(list)
        for index, kernel in enumerate(kernels):
            streams[kernel.stream].append(index)

        def applies(number: int, index: int) -> bool:
            rule = self.rules.rules[number]
            return (
                number in self._candidates(kernels[index].name)
                and self._matches(rule.range, ranges[index])
                and self._matches(rule.previous, previous[index])
                and self._matches(rule.next, following[index])
                and _fits_layer(rule, index, layers, verdicts.phases)
            )

        contextual = [number for number, rule in enumerate(self.rules.rules) if rule.needs_phases]
        for _ in range(ROUNDS):
            changed = [
                self._sweep(number, indices, verdicts, applies) for number in contextual for indices in streams.values()
            ]
            if not any(changed):
                return

    def _sweep(self, number: int, indices: list[int], verdicts: Verdicts, applies: Callable[[int, int], bool]) -> bool:
        """Try one rule on one stream, first kernel first: what it takes is the neighbour of what follows."""
        rule, phases = self.rules.rules[number], verdicts.phases
        following: dict[int, Phase | None] = {}
        nearest: Phase | None = None
        for index in reversed(indices):
            following[index] = nearest
            nearest = phases[index] or nearest
        nearest = None
        changed = False
        for index in indices:
            if (
                phases[index] is None
                and (not rule.after or nearest in rule.after)
                and (not rule.before or following[index] in rule.before)
                and applies(number, index)
            ):
                phases[index], verdicts.rules[index] = rule.phase, number
                changed = True
            nearest = phases[index] or nearest
        return changed

    def _neighbours(self, kernels: Sequence[Kernel]) -> tuple[list[str], list[str]]:
        """Names of the nearest kernels before and after each one in its stream that are no glue; empty for none."""
        previous, following = [""] * len(kernels), [""] * len(kernels)
        for names, order in ((previous, range(len(kernels))), (following, range(len(kernels) - 1, -1, -1))):
            last: dict[int, str] = {}
            for index in order:
                kernel = kernels[index]
                names[index] = last.get(kernel.stream, "")
                if not self._is_glue(kernel.name):
                    last[kernel.stream] = kernel.name
        return previous, following

    def _candidates(self, name: str) -> list[int]:
        """Rules whose kernel pattern the name matches, in order."""
        known = self._by_name.get(name)
        if known is None:
            known = self._by_name[name] = [
                number
                for number, rule in enumerate(self.rules.rules)
                if rule.kernel is None or rule.kernel.search(name)
            ]
        return known

    def _is_glue(self, name: str) -> bool:
        known = self._glue.get(name)
        if known is None:
            known = self._glue[name] = any(pattern.search(name) for pattern in self.rules.glue)
        return known

    def _matches(self, pattern: re.Pattern[str] | None, text: str) -> bool:
        if pattern is None:
            return True
        known = self._searched.get((pattern, text))
        if known is None:
            known = self._searched[pattern, text] = bool(pattern.search(text))
        return known


def _fits_layer(rule: Rule, index: int, layers: Layers, phases: list[Phase | None]) -> bool:
    if rule.position and layers.position(index) != rule.position:
        return False
    if rule.layer_has or rule.layer_lacks:
        inside = layers.around(index)
        if inside is None:
            return False
        there = {phase for phase in phases[inside.start : inside.stop] if phase is not None}
        return (not rule.layer_has or bool(rule.layer_has & there)) and not rule.layer_lacks & there
    return True
