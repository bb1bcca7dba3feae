"""How far a server is with its layers' weights: a few lines in its log, for loads that take minutes."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 10.0
"""Seconds between two lines, at the least; the last layer's line is always there."""


class LoadingLog:
    """Counts the layers of a process whose weights epfuse has taken over.

    A server builds all layers before it loads any, so the total is known when the first one is ready. Weights that are
    loaded again (an update while serving) are counted from the beginning.

    Args:
        log: the server's.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._expected = weakref.WeakSet[Any]()  # of another model that is gone nothing is counted
        self._ready = weakref.WeakSet[Any]()
        self._begun = self._said = 0.0

    def expect(self, method: Any) -> None:
        """Count a layer that is going to be loaded, by the server's object that is this layer's alone."""
        self._expected.add(method)

    @contextmanager
    def of(self, method: Any) -> Iterator[None]:
        """Around the taking over of a layer's weights; one that fails is not counted."""
        now = time.monotonic()
        if method in self._ready or not self._ready:
            self._ready.clear()
            self._begun = self._said = now
        yield
        self._ready.add(method)
        now = time.monotonic()
        ready, expected = len(self._ready), len(self._expected)
        if ready == expected or now - self._said >= EVERY:
            self._said = now
            self._log.info(
                "epfuse has the weights of %d of %d MoE layers, after %.1f s", ready, expected, now - self._begun
            )
