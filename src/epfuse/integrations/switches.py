"""The environment variables of the plugins for servers; `epfuse.environment` has the core's."""

from __future__ import annotations

import os

from epfuse.errors import ConfigError

STRICT = "EPFUSE_STRICT"
"""1: whatever goes wrong in a plugin stops the server, instead of being logged and leaving the layer to it."""
DISABLE = "EPFUSE_DISABLE"
"""1: the plugins do nothing: the server is as it is without epfuse."""
FORCE = "EPFUSE_VLLM_FORCE"
"""1: register with a vLLM that is not as the tested releases where epfuse touches it."""

SWITCHES = (STRICT, DISABLE, FORCE)


def is_on(name: str) -> bool:
    """Whether the variable is 1.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"the environment has {name}={value!r}; it must be 0 or 1")
    return value == "1"
