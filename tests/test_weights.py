"""ExpertWeights describes one layer, or says which tensor does not fit."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertWeights, Target
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError, DeviceError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.block_fp8 import BlockFP8, BlockScale
from epfuse.weights.projections import expert_matrix

W13 = torch.zeros(3, 20, 8, dtype=torch.bfloat16)
W2 = torch.zeros(3, 8, 10, dtype=torch.bfloat16)


def test_sizes_come_from_the_tensors_which_are_kept() -> None:
    weights = ExpertWeights.bf16(W13, W2)
    assert (weights.local_experts, weights.hidden, weights.intermediate) == (3, 8, 10)
    assert weights.dense_experts.w13 is W13
    assert weights.device == torch.device("cpu")
    assert weights.activation_dtypes == (torch.bfloat16,)
    assert weights.nbytes == {WeightFormat.DENSE: 2 * (3 * 20 * 8 + 3 * 8 * 10)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_takes_other_dtypes_and_bf16_does_not(dtype: torch.dtype) -> None:
    assert ExpertWeights.dense(W13.to(dtype), W2.to(dtype)).activation_dtypes == (dtype,)
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
        (W13, W2.float(), DtypeError, "w13 is in torch.bfloat16 and w2 in torch.float32; both must have one dtype"),
        (W13, W2.to("meta"), DeviceError, "w13 is on cpu and w2 on meta; both must be on one device"),
    ],
)
def test_bad_weights(w13: torch.Tensor, w2: torch.Tensor, kind: type[EpfuseError], words: str) -> None:
    with pytest.raises(kind) as caught:
        ExpertWeights.dense(w13, w2)
    assert words in str(caught.value)


def parts(local: int = 3, hidden: int = 64, intermediate: int = 96) -> tuple[torch.Tensor, ...]:
    """w13, its scales, w2, its scales."""
    g = torch.Generator().manual_seed(0)
    stacks = [
        torch.randn(local, 2 * intermediate, hidden, generator=g),
        torch.randn(local, hidden, intermediate, generator=g),
    ]
    return tuple(part for w in map(MXFP8.quantize, stacks) for part in (w.values, w.scales))


def numbers(weights: ExpertWeights) -> list[torch.Tensor]:
    experts = weights.reference_experts
    return [
        expert_matrix(stack, expert, torch.float64)
        for stack in (experts.w13, experts.w2)
        for expert in range(weights.local_experts)
    ]


def test_hybrid_keeps_bf16_copies_of_the_same_numbers_and_states_the_bytes_of_each() -> None:
    weights = ExpertWeights.hybrid(*parts())
    values = 3 * 3 * 64 * 96
    assert weights.nbytes == {WeightFormat.MXFP8: values * 33 // 32, WeightFormat.DENSE: values * 2}
    assert weights.activation_dtypes == (torch.bfloat16,)
    packed, dense = weights.kept[WeightFormat.MXFP8], weights.kept[WeightFormat.DENSE]
    assert torch.equal(dense.w13.double(), packed.w13.dequantize(torch.float64))
    assert torch.equal(dense.w2.double(), packed.w2.dequantize(torch.float64))


@pytest.mark.parametrize("make", [ExpertWeights.mxfp8, ExpertWeights.hybrid, ExpertWeights.block_fp8])
def test_for_gfx942_values_become_fnuz_in_their_own_memory_and_no_number_changes(make) -> None:
    weights = make(*parts())
    before = numbers(weights)
    pointers = [stack.values.data_ptr() for stack in (weights.reference_experts.w13, weights.reference_experts.w2)]
    ready = weights.prepare(Target.GFX942)
    experts = ready.reference_experts
    assert [stack.values.data_ptr() for stack in (experts.w13, experts.w2)] == pointers
    assert experts.w13.values.dtype == experts.w2.values.dtype == torch.float8_e4m3fnuz
    for ours, theirs in zip(numbers(ready), before, strict=True):
        assert torch.equal(ours, theirs)
    assert {WeightFormat.MXFP8_FNUZ, WeightFormat.BLOCK_FP8_FNUZ} & set(ready.kept)
    assert (WeightFormat.DENSE in ready.kept) == (make == ExpertWeights.hybrid)
    again = ready.prepare(Target.GFX942)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(numbers(again), before, strict=True))


@pytest.mark.parametrize("broken", [1, 3])
def test_a_scale_that_fnuz_cannot_double_is_refused_and_nothing_is_changed(broken: int) -> None:
    tensors = parts()
    tensors[broken][1, 2, 0] = 254
    before = [tensor.view(torch.uint8).clone() for tensor in tensors]
    with pytest.raises(ConfigError, match="254"):
        ExpertWeights.mxfp8(*tensors).prepare(Target.GFX942)
    assert all(torch.equal(tensor.view(torch.uint8), old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("target", [Target.GFX950, Target.CPU])
def test_targets_that_read_checkpoint_order_get_it(target: Target) -> None:
    weights = ExpertWeights.mxfp8(*parts())
    assert weights.prepare(target) is weights


@pytest.mark.parametrize("rule", list(BlockScale))
def test_block_fp8_is_converted_from_mxfp8_in_new_memory(rule: BlockScale) -> None:
    tensors = parts()
    before = [tensor.view(torch.uint8).clone() for tensor in tensors]
    weights = ExpertWeights.block_fp8(*tensors, scale=rule)
    assert list(weights.kept) == [WeightFormat.BLOCK_FP8]
    assert weights.nbytes == {WeightFormat.BLOCK_FP8: 3 * 3 * 64 * 96 + 4 * 3 * (2 * 1 + 1 * 1)}
    assert (weights.local_experts, weights.hidden, weights.intermediate) == (3, 64, 96)
    assert weights.reference_experts.w13.shape == (3, 192, 64)
    expected = BlockFP8.quantize(MXFP8(tensors[0], tensors[1]), rule).dequantize(torch.float64)
    assert torch.equal(expert_matrix(weights.reference_experts.w13, 1, torch.float64), expected[1])
    assert all(torch.equal(tensor.view(torch.uint8), old) for tensor, old in zip(tensors, before, strict=True))


def test_mxfp8_takes_activations_of_any_dtype() -> None:
    assert ExpertWeights.mxfp8(*parts()).activation_dtypes == (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda p: (p[0].view(torch.uint8), *p[1:]), DtypeError, "w13 has dtype torch.uint8; it must be float8_e4m3fn"),
        (lambda p: (p[0], p[1][..., :1], *p[2:]), ShapeError, "w13, w13_scale: scales has shape (3, 192, 1)"),
        (lambda p: (*p[:3], p[3].float()), DtypeError, "w2, w2_scale: scales has dtype torch.float32"),
        (lambda p: (*p[:2], p[2][:2], p[3][:2]), ShapeError, "w2 has shape (2, 64, 96); beside w13"),
        (lambda p: (p[0][0], p[1][0], *p[2:]), ShapeError, "w13 has shape (192, 64); it must be three-dimensional"),
        (lambda p: (*p[:3], None), ConfigError, "w2_scale is a NoneType; it must be a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("make", [ExpertWeights.mxfp8, ExpertWeights.block_fp8])
def test_bad_mxfp8_weights(make, change, kind: type[EpfuseError], words: str) -> None:
    with pytest.raises(kind) as caught:
        make(*change(parts()))
    assert words in str(caught.value)
