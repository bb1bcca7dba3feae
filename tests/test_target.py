"""Which GPU a device is: what is no device is refused in words."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from epfuse import Target, target_of
from epfuse.errors import DeviceError
from epfuse.target import on_device


def test_another_device_than_the_current_one_is_made_that(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    for name in ("cpu", "meta", "cuda:1", "cuda:0", "cuda:2"):
        with on_device(torch.device(name)):
            pass
    assert made == [torch.device("cuda", 0), torch.device("cuda", 2)]


def test_the_cpu_is_a_target() -> None:
    assert target_of(torch.device("cpu")) is Target.CPU


@pytest.mark.parametrize("device", ["cpu", "cuda:99999", 0, None])
def test_refuses_what_is_no_device(device: Any) -> None:
    with pytest.raises(DeviceError, match=r"device is .*; it must be a torch.device"):
        target_of(device)
