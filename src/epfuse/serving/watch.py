"""What ends a job before its end: a signal, a claim that was taken away, a deadline."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from epfuse.errors import EpfuseError
from epfuse.serving.claim import Claim, Revoked

MEANINGS = {
    signal.SIGTERM: "SIGTERM: cancelled, or the batch system's time limit",
    signal.SIGUSR1: "SIGUSR1: the batch system's time limit is near",
    signal.SIGINT: "SIGINT: interrupted by hand",
}


class Ended(EpfuseError):
    """The job has to end now; the message says why.

    Fix: none where you asked for the end; else a longer deadline in the recipe.
    """


class ServerWatch:
    """Looks at all of it, whenever it is called.

    Args:
        claim: this job's.
        deadline: seconds that the whole job may take.
    """

    def __init__(self, claim: Claim, deadline: float) -> None:
        self._claim = claim
        self._end = time.monotonic() + deadline
        self._deadline = deadline
        self._phase: tuple[str, float, float] | None = None
        self._signal: signal.Signals | None = None

    def __call__(self) -> None:
        """Raise what ends the job, if anything does.

        Raises:
            Ended: a signal came, or a deadline is over.
            Revoked: the claim is lost.
        """
        if self._signal is not None:
            raise Ended(MEANINGS[self._signal])
        if not self._claim.held:
            raise Revoked(f"attempt {self._claim.holder.key} no longer holds the point")
        now = time.monotonic()
        if now > self._end:
            raise Ended(f"the job has taken longer than {self._deadline:.0f} s")
        if self._phase is not None and now > self._phase[1]:
            raise Ended(f"{self._phase[0]} has taken longer than {self._phase[2]:.0f} s")

    def note(self, phase: str) -> None:
        """Say outside what is being done (`Claim.note`)."""
        self._claim.note(phase)

    @contextlib.contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """Give what the block does a deadline of its own."""
        self._phase = (name, time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._phase = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Note signals in the block instead of dying of them: the next look raises."""

        def note(number: int, _: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number)

        old = {number: signal.signal(number, note) for number in MEANINGS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
