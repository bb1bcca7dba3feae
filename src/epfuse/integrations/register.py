"""What every plugin does when its server calls it: stand down with a reason, or offer epfuse's experts, once a process.

A plugin's file names its server and what offers the experts there; nothing of either is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from epfuse import __version__
from epfuse.integrations.switches import DISABLE, STRICT, is_on

if TYPE_CHECKING:
    from epfuse.integrations.interfaces import ServerProject


class Releases(Protocol):
    """A server's module ``releases``."""

    @property
    def TESTED(self) -> tuple[str, ...]:
        """The releases that epfuse was tested with, the newest last."""

    def installed(self) -> str:
        """The installed version, for messages."""

    def package(self) -> Path | None:
        """The directory that its modules are in; None if it can't be found."""


@contextmanager
def leaving_the_server_alone(log: Logger) -> Iterator[None]:
    """Log an exception that is raised inside, and swallow it, unless EPFUSE_STRICT=1."""
    try:
        yield
    except Exception:
        if is_on(STRICT):
            raise
        log.exception("epfuse %s is not in use: registering failed", __version__)


def is_disabled(log: Logger) -> bool:
    """Whether EPFUSE_DISABLE=1, which is then logged."""
    disabled = is_on(DISABLE)
    if disabled:
        log.info("epfuse %s is not in use: %s=1", __version__, DISABLE)
    return disabled


def offer(
    server: ServerProject, releases: Releases, log: Logger, install: Callable[[], bool], force: str | None
) -> None:
    """Install epfuse's experts in a server whose package is as a tested release's, and log what was decided.

    Args:
        server: which.
        releases: what is installed of it, and what was tested.
        log: a logger below the server's own.
        install: puts them there; false if something else already is.
        force: name of the variable that has a server used that is not as a tested release; None if there is none.
    """
    found, package = releases.installed(), releases.package()
    match = None if package is None else server.nearest(package)
    if (match is None or match.differences) and not (force and is_on(force)):
        log.warning(
            "epfuse %s is not in use: %s %s is not as the releases that it was tested with, %s: %s%s",
            __version__,
            server.name,
            found,
            ", ".join(releases.TESTED),
            "its package can't be found" if match is None else match,
            f" ({force}=1 uses it all the same)" if force else "",
        )
    elif install():
        like = "" if match is None or found == match.release else f", which looks like {match.release}"
        log.info("epfuse %s offers its experts to %s %s%s", __version__, server.name, found, like)
