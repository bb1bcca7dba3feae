"""Have a layer's kernels compiled and loaded before a server says that it is ready."""

from __future__ import annotations

import logging

from epfuse.integrations.load import LoadedLayer
from epfuse.integrations.switches import STRICT, is_on

MAX_TOKENS = 8192
"""Of a call, where the server has not said."""


def warm(loaded: LoadedLayer, max_tokens: int | None, log: logging.Logger) -> None:
    """Compile what is not compiled, in processes beside this one, and load it all; a layer like one before is done.

    An exception is logged, and kernels are then compiled when a call needs them, unless EPFUSE_STRICT=1.

    Args:
        loaded: the layer, whose weights are where it runs.
        max_tokens: the server's largest batch; None where it has not said.
        log: the server's, where progress goes.
    """
    if loaded.weights.device.type != "cuda":
        return
    from epfuse.compiled.model import layers_of
    from epfuse.compiled.warm_up import warm_up

    try:
        for layer in layers_of(loaded.plan):
            warm_up(layer, max_tokens or MAX_TOKENS, lambda line: log.info("epfuse: %s", line))
    except Exception:
        if is_on(STRICT):
            raise
        log.exception("epfuse could not compile its kernels beforehand; they are compiled when they are needed")
