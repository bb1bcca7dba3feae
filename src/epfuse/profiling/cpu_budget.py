"""A limit of CPU time for what a stranger's file makes the standard library do, regular expressions above all."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from epfuse.errors import ConfigError


class _Spent(TimeoutError):
    """No ValueError: a parser that the alarm meets must not take it for one of its own."""


class CpuBudget:
    """CPU time of this process for several pieces of work together.

    The alarm reaches the main thread only, and in it C code that asks for signals, as `re` does while it searches. In
    other threads nothing is limited.

    Args:
        seconds: for all of it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self._left = seconds

    @contextlib.contextmanager
    def spend(self, what: Callable[[], str]) -> Iterator[None]:
        """Run the block.

        Raises:
            ConfigError: the budget is spent; ``what`` then says what spent it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGVTALRM, _ring)
        began = time.process_time()  # the timer itself counts in ticks, of which a short block has none
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, max(self._left, 0.001))
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                self._left -= time.process_time() - began
            if self._left < 0:
                raise _Spent
        except _Spent:
            raise ConfigError(f"{what()} takes more than {self.seconds:g} seconds of CPU time; simplify it") from None
        finally:
            signal.signal(signal.SIGVTALRM, before)


def _ring(*_: object) -> None:
    raise _Spent
