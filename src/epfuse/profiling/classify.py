"""Kernels to phases by rules: first by what a kernel is called, then by what stands around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epfuse.profiling.cpu_budget import CpuBudget
from epfuse.profiling.events import TracedKernel
from epfuse.profiling.layers import Layers
from epfuse.profiling.phases import Phase
from epfuse.profiling.rules import Rule, RuleSet

ROUNDS = 6
"""A kernel that one round classified may let the next one classify its neighbour; chains are short."""

JOINED_BY = " > "

MATCHING_SECONDS = 20.0
"""CPU time for all searches of all patterns: a regular expression can take time that doubles with every character."""


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
        self._by_name: dict[str, dict[int, None]] = {}
        self._glue: dict[str, bool] = {}
        self._searched: dict[tuple[re.Pattern[str], str], bool] = {}
        self._tried: re.Pattern[str] | None = None
        self._budget = CpuBudget(MATCHING_SECONDS)

    def by_name(self, kernels: Sequence[TracedKernel], ranges: Sequence[str]) -> Verdicts:
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

    def by_context(
        self, kernels: Sequence[TracedKernel], ranges: Sequence[str], layers: Layers, verdicts: Verdicts
    ) -> None:
        """Classify what `by_name` left, rule by rule, until nothing changes. Changes ``verdicts``."""
        previous, following = self._neighbours(kernels)
        in_layers = _PhasesOfLayers(layers, verdicts.phases)

        def applies(number: int, index: int) -> bool:
            rule = self.rules.rules[number]
            return (
                self._matches(rule.range, ranges[index])
                and self._matches(rule.previous, previous[index])
                and self._matches(rule.next, following[index])
                and in_layers.fit(rule, index)
            )

        contextual = [number for number, rule in enumerate(self.rules.rules) if rule.needs_phases]
        for _ in range(ROUNDS):
            changed = [self._sweep(number, kernels, verdicts, applies, in_layers) for number in contextual]
            if not any(changed):
                return

    def _sweep(
        self,
        number: int,
        kernels: Sequence[TracedKernel],
        verdicts: Verdicts,
        applies: Callable[[int, int], bool],
        in_layers: _PhasesOfLayers,
    ) -> bool:
        """Try one rule, stream by stream, first kernel first: what it takes is the neighbour of what follows."""
        rule, phases = self.rules.rules[number], verdicts.phases
        open_ones = {
            index
            for index, phase in enumerate(phases)
            if phase is None and number in self._candidates(kernels[index].name)
        }
        if not open_ones:
            return False
        following: dict[int, Phase | None] = {}
        nearest: dict[int, Phase] = {}  # by stream
        for index in range(len(kernels) - 1, -1, -1):
            phase = phases[index]
            if phase is not None:
                nearest[kernels[index].stream] = phase
            elif index in open_ones:
                following[index] = nearest.get(kernels[index].stream)
        nearest.clear()
        changed = False
        for index, kernel in enumerate(kernels):
            if (
                index in open_ones
                and (not rule.after or nearest.get(kernel.stream) in rule.after)
                and (not rule.before or following[index] in rule.before)
                and applies(number, index)
            ):
                phases[index], verdicts.rules[index] = rule.phase, number
                in_layers.add(index, rule.phase)
                changed = True
            phase = phases[index]
            if phase is not None:
                nearest[kernel.stream] = phase
        return changed

    def _neighbours(self, kernels: Sequence[TracedKernel]) -> tuple[list[str], list[str]]:
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

    def _candidates(self, name: str) -> dict[int, None]:
        """Rules whose kernel pattern the name matches, in order."""
        known = self._by_name.get(name)
        if known is None:
            with self._budget.spend(self._who_spent_it):
                known = self._by_name[name] = dict.fromkeys(
                    number
                    for number, rule in enumerate(self.rules.rules)
                    if rule.kernel is None or self._search(rule.kernel, name)
                )
        return known

    def _is_glue(self, name: str) -> bool:
        known = self._glue.get(name)
        if known is None:
            with self._budget.spend(self._who_spent_it):
                known = self._glue[name] = any(self._search(pattern, name) for pattern in self.rules.glue)
        return known

    def _matches(self, pattern: re.Pattern[str] | None, text: str) -> bool:
        if pattern is None:
            return True
        known = self._searched.get((pattern, text))
        if known is None:
            with self._budget.spend(self._who_spent_it):
                known = self._searched[pattern, text] = self._search(pattern, text)
        return known

    def _search(self, pattern: re.Pattern[str], text: str) -> bool:
        self._tried = pattern
        return pattern.search(text) is not None

    def _who_spent_it(self) -> str:
        pattern = "" if self._tried is None else self._tried.pattern
        return f"matching names, at last with {pattern[:80]!r} of rules {self.rules.where.get(self._tried)},"


class _PhasesOfLayers:
    """Which phases each layer has so far; a kernel that has one keeps it, so they only become more."""

    def __init__(self, layers: Layers, phases: Sequence[Phase | None]) -> None:
        self._layers = layers
        self._there = {span.start: {phases[i] for i in span} for span in layers.spans}

    def add(self, index: int, phase: Phase) -> None:
        """A kernel got its phase."""
        if (inside := self._layers.around(index)) is not None:
            self._there[inside.start].add(phase)

    def fit(self, rule: Rule, index: int) -> bool:
        """Whether a rule's conditions on layers hold for a kernel."""
        if rule.position and self._layers.position(index) != rule.position:
            return False
        if rule.layer_has or rule.layer_lacks:
            inside = self._layers.around(index)
            if inside is None:
                return False
            there = self._there[inside.start]
            return (not rule.layer_has or bool(rule.layer_has & there)) and not rule.layer_lacks & there
        return True
