"""ExpertWeights describes one layer, or says which tensor does not fit."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertWeights
from epfuse.errors import ConfigError, DeviceError, DtypeError, EpfuseError, LayoutError, ShapeError

W13 = torch.zeros(3, 20, 8, dtype=torch.bfloat16)
W2 = torch.zeros(3, 8, 10, dtype=torch.bfloat16)


def test_sizes_come_from_the_tensors_which_are_kept() -> None:
    weights = ExpertWeights.bf16(W13, W2)
    assert (weights.local_experts, weights.hidden, weights.intermediate) == (3, 8, 10)
    assert weights.dense_experts.w13 is W13
    assert (weights.dtype, weights.device) == (torch.bfloat16, torch.device("cpu"))
    assert weights.nbytes == 2 * (3 * 20 * 8 + 3 * 8 * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_takes_other_dtypes_and_bf16_does_not(dtype: torch.dtype) -> None:
    assert ExpertWeights.dense(W13.to(dtype), W2.to(dtype)).dtype == dtype
    with pytest.raises(DtypeError, match=r"w13 has dtype .*; it must be bfloat16"):
        ExpertWeights.bf16(W13.to(dtype), W2.to(dtype))


@pytest.mark.parametrize(
    ("w13", "w2", "kind", "words"),
    [
        ([1.0], W2, ConfigError, "w13 is a list; it must be a torch.Tensor"),
        (W13, None, ConfigError, "w2 is a NoneType; it must be a torch.Tensor"),
        (W13[0], W2, ShapeError, "w13 has shape (20, 8); it must be three-dimensional: [L, 2I, H]"),
        (W13, W2[0], ShapeError, "w2 has shape (8, 10); it must be three-dimensional: [L, H, I]"),
        (W13[:, :19].clone(), W2, ShapeError, "w13 has shape (3, 19, 8); it must be [L, 2I, H]"),
        (W13[:, :0], W2, ShapeError, "w13 has shape (3, 0, 8); it must be [L, 2I, H] with I and H at least 1"),
        (W13, W2[:2], ShapeError, "w2 has shape (2, 8, 10); beside w13 (3, 20, 8) it must be [L, H, I] = (3, 8, 10)"),
        (W13, W2.transpose(1, 2).contiguous(), ShapeError, "w2 has shape (3, 10, 8); beside w13"),
        (W13, W2.transpose(1, 2).contiguous().transpose(1, 2), LayoutError, "w2 has strides (80, 1, 8)"),
        (W13.to(torch.int8), W2, DtypeError, "w13 has dtype torch.int8; it must be bfloat16, float16 or float32"),
        (W13, W2.float(), DtypeError, "w13 is torch.bfloat16 and w2 is torch.float32; both must have one dtype"),
        (W13, W2.to("meta"), DeviceError, "w13 is on cpu and w2 on meta; both must be on one device"),
    ],
)
def test_bad_weights(w13: torch.Tensor, w2: torch.Tensor, kind: type[EpfuseError], words: str) -> None:
    with pytest.raises(kind) as caught:
        ExpertWeights.dense(w13, w2)
    assert words in str(caught.value)
