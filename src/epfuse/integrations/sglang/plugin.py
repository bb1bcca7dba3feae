"""The entry point of SGLang's plugin group ``sglang.srt.plugins``, called once in each of its processes."""

from __future__ import annotations

import functools
import logging

from epfuse import __version__
from epfuse.integrations.switches import DISABLE, STRICT, is_on

log: logging.Logger = logging.getLogger("sglang.srt.epfuse")  # below SGLang's own logger, whose handlers print it


def register() -> None:
    """Offer epfuse's experts to this process's SGLang; nothing else is changed.

    An exception is logged and leaves SGLang untouched, unless EPFUSE_STRICT=1.
    """
    try:
        _register_once()
    except Exception:
        if is_on(STRICT):
            raise
        log.exception("epfuse %s is not in use: registering failed", __version__)


@functools.cache
def _register_once() -> None:
    if is_on(DISABLE):
        log.info("epfuse %s is not in use: %s=1", __version__, DISABLE)
        return
    from epfuse.integrations.sglang import releases
    from epfuse.integrations.sglang.interfaces import SGLANG

    found, package = releases.installed(), releases.package()
    match = None if package is None else SGLANG.nearest(package)
    if match is None or match.differences:
        log.warning(
            "epfuse %s is not in use: SGLang %s is not as the releases that it was tested with, %s: %s",
            __version__,
            found,
            ", ".join(releases.TESTED),
            "its package can't be found" if match is None else match,
        )
        return
    from epfuse.integrations.sglang.hooks import install

    install()
    like = "" if found == match.release else f", which looks like {match.release}"
    log.info("epfuse %s offers its experts to SGLang %s%s", __version__, found, like)
