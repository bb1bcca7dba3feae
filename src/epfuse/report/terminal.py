"""Rich's console, whose readers may leave: what was computed is still written to where it can be."""

from __future__ import annotations

import errno
import os

import rich.console


class Console(rich.console.Console):
    """Without rich's way of ending at a broken pipe: with exit code 1, and before files that come after are written."""

    def on_broken_pipe(self) -> None:
        """Progress that nobody reads is dropped; a result that nobody reads is an output that could not be written.

        Raises:
            BrokenPipeError: it is stdout.
        """
        if not self.stderr:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self.quiet = True
