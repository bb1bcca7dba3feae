"""The ``--device`` option's value as a device."""

from __future__ import annotations

import os
import re

import torch

from epfuse.errors import ConfigError, DeviceError

NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]*))?")
"""torch keeps an index in 8 bits and takes cuda:256 for cuda:0; so it is read here."""


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; None is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: no device has such a name.
        DeviceError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    wanted = NAME.fullmatch(name)
    if wanted is None:
        raise ConfigError(f"device is {name!r}; it must be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if len(wanted[1] or "") > 6 or int(wanted[1] or 0) >= found:
        raise DeviceError(f"device is {name!r}; torch {torch.__version__} finds {found} GPU(s)")
    return torch.device("cuda", int(wanted[1] or 0))


def check_memory(nbytes: int, device: torch.device, what: str) -> None:
    """Refuse sizes that the device could not hold even if nothing else were in its memory.

    Args:
        nbytes: the least that the work takes.
        device: where.
        what: what takes it, for the message.

    Raises:
        DeviceError: the device has less memory.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > memory:
        raise DeviceError(
            f"{what} take at least {nbytes / 1e9:,.0f} GB; {device} has {memory / 1e9:,.0f} GB: choose smaller sizes"
        )
