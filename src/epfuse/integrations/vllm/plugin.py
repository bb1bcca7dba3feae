"""The entry point of vLLM's plugin group ``vllm.general_plugins``.

vLLM calls `register` in the API server, the engine core and every worker, possibly more than once in a process.
"""

from __future__ import annotations

import functools
import logging

from epfuse.environment import environment
from epfuse.integrations.register import is_disabled, leaving_the_server_alone, offer
from epfuse.integrations.switches import FORCE

log: logging.Logger = logging.getLogger("vllm.epfuse")  # below vLLM's own logger, whose handlers print it


def register() -> None:
    """Offer epfuse's experts to this process's vLLM; nothing else is changed.

    An exception is logged and leaves vLLM untouched, unless EPFUSE_STRICT=1.
    """
    with leaving_the_server_alone(log):
        _register_once()


@functools.cache
def _register_once() -> None:
    if is_disabled(log):
        return
    from epfuse.integrations.vllm import releases
    from epfuse.integrations.vllm.interfaces import VLLM

    _print_as_vllm_does()
    offer(VLLM, releases, log, _install, FORCE)


def _install() -> bool:
    from epfuse.integrations.vllm.stand_in import register_layer

    return register_layer()


def _print_as_vllm_does() -> None:
    """Give vLLM's handlers to epfuse's own logger, if it has none: else warnings come bare, without time and level.

    EPFUSE_LOG's handler, which comes with the first look at the environment, counts. Handlers that somebody gives to
    the root later would print each line once more, so lines go no further than vLLM's own do.
    """
    environment()
    ours, theirs = logging.getLogger("epfuse"), logging.getLogger("vllm")
    if theirs.handlers and not ours.hasHandlers():
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.propagate = theirs.propagate
