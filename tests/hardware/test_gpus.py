"""Which GPU a driver's name means."""

from __future__ import annotations

import pytest

from epfuse.hardware.gpus import B200, H100, H200, named


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA H200 NVL", H200),
        ("NVIDIA B200", B200),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_a_slice_or_a_relative_is_not_the_gpu(name: str, gpu: object) -> None:
    assert named(name) is gpu
