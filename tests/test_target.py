"""Which GPU a device is: what is no device is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epfuse import Target, target_of
from epfuse.errors import DeviceError


def test_the_cpu_is_a_target() -> None:
    assert target_of(torch.device("cpu")) is Target.CPU


@pytest.mark.parametrize("device", ["cpu", "cuda:99999", 0, None])
def test_refuses_what_is_no_device(device: Any) -> None:
    with pytest.raises(DeviceError, match=r"device is .*; it must be a torch.device"):
        target_of(device)
