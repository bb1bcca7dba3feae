"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_api_example() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 14  # it is read in one look
    names: dict[str, object] = {}
    try:
        exec(compile(example, str(README), "exec"), names)
    finally:
        torch.set_default_device(None)  # the example sets it
    y = names["y"]
    assert isinstance(y, torch.Tensor)
    assert y.shape == (37, 256)
    assert y.isfinite().all()
    assert y.any()
