"""The core's environment variables, all of them; read once, when first needed.

| variable | values | meaning |
| --- | --- | --- |
| `EPFUSE_POLICY` | `auto` (default), `seed-1782` | the policy of plans that name none |
| `EPFUSE_PATH` | `auto` (default) or the name of a path | what `Path.AUTO` stands for |
| `EPFUSE_LOG` | `debug`, `info`, `warning` (default), `error` | how much of epfuse's log goes to stderr |
| `EPFUSE_KERNELS` | a folder | kernels that `epfuse warmup` has compiled (`epfuse.bundle`) |
| `EPFUSE_NO_COMPILE` | `0` (default), `1` | `1`: compiling a kernel after a warm-up is an error, not a warning |
| `EPFUSE_LAUNCH_PLANS` | `1` (default), `0` | `0`: eager calls on Hopper launch without plans (`epfuse.launch_plan`) |

Any other value is an error. An argument in code wins over the variable. Integrations may read variables of their own.
"""

from __future__ import annotations

import enum
import functools
import logging
import os
from dataclasses import dataclass
from typing import TypeVar

from epfuse.arguments import checks_enums
from epfuse.config import Path, Policy
from epfuse.errors import ConfigError


class LogLevel(enum.Enum):
    """How much of epfuse's log goes to stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Switch(enum.Enum):
    """Off or on."""

    OFF = "0"
    ON = "1"


E = TypeVar("E", bound=enum.Enum)

VARIABLES = ("EPFUSE_POLICY", "EPFUSE_PATH", "EPFUSE_LOG", "EPFUSE_KERNELS", "EPFUSE_NO_COMPILE",
             "EPFUSE_LAUNCH_PLANS")  # fmt: skip
"""The table's names."""


@checks_enums
@dataclass(frozen=True)
class Environment:
    """What the environment asks for.

    Attributes:
        policy: of plans that name none (EPFUSE_POLICY).
        path: what `Path.AUTO` stands for (EPFUSE_PATH).
        log: how much is logged (EPFUSE_LOG); None leaves logging as the application has set it.
        kernels: folder of a bundle (EPFUSE_KERNELS).
        no_compile: whether compiling after a warm-up is an error (EPFUSE_NO_COMPILE).
        launch_plans: whether eager calls on Hopper launch by plan (EPFUSE_LAUNCH_PLANS).
    """

    policy: Policy = Policy.AUTO
    path: Path = Path.AUTO
    log: LogLevel | None = None
    kernels: str | None = None
    no_compile: bool = False
    launch_plans: bool = True


@functools.cache
def environment() -> Environment:
    """The process's environment, read and checked once; with EPFUSE_LOG also switches epfuse's log on.

    Raises:
        ConfigError: a variable has a value that is not in the table above.
    """
    found = Environment(
        policy=_read("EPFUSE_POLICY", Policy) or Policy.AUTO,
        path=_read("EPFUSE_PATH", Path) or Path.AUTO,
        log=_read("EPFUSE_LOG", LogLevel),
        kernels=os.environ.get("EPFUSE_KERNELS") or None,
        no_compile=_read("EPFUSE_NO_COMPILE", Switch) is Switch.ON,
        launch_plans=_read("EPFUSE_LAUNCH_PLANS", Switch) is not Switch.OFF,
    )
    if found.log is not None:
        _log_to_stderr(found.log)
    return found


def _read(name: str, kind: type[E]) -> E | None:
    """The variable's value; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise ConfigError(f"the environment has {name}={text!r}; it must be one of {known}") from None


def _log_to_stderr(level: LogLevel) -> None:
    log = logging.getLogger("epfuse")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level.value.upper())
