"""The entry point of SGLang's plugin group ``sglang.srt.plugins``, called once in each of its processes."""

from __future__ import annotations

import functools
import logging

from epfuse.integrations.register import is_disabled, leaving_the_server_alone, offer

log: logging.Logger = logging.getLogger("sglang.srt.epfuse")  # below SGLang's own logger, whose handlers print it


def register() -> None:
    """Offer epfuse's experts to this process's SGLang; nothing else is changed.

    An exception is logged and leaves SGLang untouched, unless EPFUSE_STRICT=1.
    """
    with leaving_the_server_alone(log):
        _register_once()


@functools.cache
def _register_once() -> None:
    if is_disabled(log):
        return
    from epfuse.integrations.sglang import releases
    from epfuse.integrations.sglang.interfaces import SGLANG

    offer(SGLANG, releases, log, _install, force=None)


def _install() -> bool:
    from epfuse.integrations.sglang.hooks import install

    install()
    return True
