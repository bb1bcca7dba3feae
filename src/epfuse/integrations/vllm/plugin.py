"""The entry point of vLLM's plugin group ``vllm.general_plugins``.

vLLM calls `register` in the API server, the engine core and every worker, possibly more than once in a process.
"""

from __future__ import annotations

import functools
import logging

from epfuse import __version__
from epfuse.integrations.switches import DISABLE, FORCE, STRICT, is_on

log: logging.Logger = logging.getLogger("vllm.epfuse")  # below vLLM's own logger, whose handlers print it


def register() -> None:
    """Offer epfuse's experts to this process's vLLM; nothing else is changed.

    An exception is logged and leaves vLLM untouched, unless EPFUSE_STRICT=1.
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
    from epfuse.integrations.vllm import releases
    from epfuse.integrations.vllm.interfaces import VLLM

    found, package = releases.installed(), releases.package()
    match = None if package is None else VLLM.nearest(package)
    if (match is None or match.differences) and not is_on(FORCE):
        log.warning(
            "epfuse %s is not in use: vLLM %s is not as the releases that it was tested with, %s: %s"
            " (%s=1 uses it all the same)",
            __version__,
            found,
            ", ".join(releases.TESTED),
            "its package can't be found" if match is None else match,
            FORCE,
        )
        return
    from epfuse.integrations.vllm.layer import register_layer

    if register_layer():
        like = "" if match is None or found == match.release else f", which looks like {match.release}"
        log.info("epfuse %s offers its experts to vLLM %s%s", __version__, found, like)
