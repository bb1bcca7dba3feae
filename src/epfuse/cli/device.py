"""The ``--device`` option's value as a device."""

from __future__ import annotations

import torch

from epfuse.errors import ConfigError, DeviceError


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; None is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: no device has such a name.
        DeviceError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; it must be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {name!r}; it must be cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        index = device.index or 0
        if index >= found:
            raise DeviceError(f"device is {name!r}; torch {torch.__version__} finds {found} GPU(s)")
        return torch.device("cuda", index)
    return torch.device("cpu")
