"""How it goes with the places of a launcher: who does not answer is asked later, and later each time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Clock(Protocol):
    """Time, or what a test takes for it."""

    def now(self) -> float:
        """Seconds that never go back; only differences mean anything."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class WallClock:
    """Time, which nobody sets: two looks are as far apart as they seem, and a pause ends when it should."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class _Silence:
    since: float
    failures: int = 0
    until: float = 0.0


@dataclass
class Contacts:
    """Places that do not answer, and since when.

    Fast refusals must not burn the tries, nor a busy controller be stormed by all of its users at the same time.

    Attributes:
        shortest: seconds of the first pause; each one after it is twice as long, less up to a half by chance.
        longest: seconds of the longest pause.
        clock: the time.
        say: takes what is new, for the journal and for people.
    """

    shortest: float
    longest: float
    clock: Clock
    say: Callable[[str], None]
    chance: random.Random = field(default_factory=random.Random)
    _silent: dict[str, _Silence] = field(default_factory=dict)

    def paused(self, place: str) -> bool:
        """Whether it is too early to ask a place again."""
        silence = self._silent.get(place)
        return silence is not None and self.clock.now() < silence.until

    def failed(self, place: str, why: str) -> None:
        """A place has not answered."""
        if place not in self._silent:
            self._silent[place] = _Silence(self.clock.now())
            self.say(f"{place} does not answer: {why}")
        silence = self._silent[place]
        pause = min(self.longest, self.shortest * 2 ** min(silence.failures, 16))
        silence.failures += 1
        silence.until = self.clock.now() + pause * self.chance.uniform(0.5, 1.0)

    def answered(self, place: str) -> None:
        """A place has answered."""
        silence = self._silent.pop(place, None)
        if silence is not None:
            self.say(f"{place} answers again, after {self.clock.now() - silence.since:.0f} s")

    def silent_for(self, seconds: float) -> str | None:
        """A place that has not answered for so long, in words."""
        now = self.clock.now()
        silent = (place for place, silence in self._silent.items() if now - silence.since > seconds)
        return next((f"{place} has not answered for {seconds:.0f} s" for place in silent), None)


def submitting(place: str) -> str:
    """The name of submissions to a place, which may be refused while looks are answered."""
    return f"{place}, asked to take a job,"


def cancelling(place: str) -> str:
    """The name of cancels at a place."""
    return f"{place}, asked to end a job,"
