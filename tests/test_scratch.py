"""Calls in the caller's memory: the same bits, nothing beyond what was asked for, and no allocation of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import epfuse.api
from epfuse import Combine, ExpertWeights, Path, Scratch, Target, fused_experts, scratch_size
from epfuse.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError
from epfuse.scratch import ScratchSize
from epfuse.target import REFERENCE_DEVICE
from tests.cases import Case, make_case

TOKENS, TOP_K, HIDDEN, INTERMEDIATE = 9, 4, 160, 96
PATHS = [path for path in Path if path not in (Path.AUTO, Path.REFERENCE)]
GUARD = 7.0


@pytest.fixture
def case(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A call that the kernels run, in the interpreter where there is no GPU."""
    if device.type == "cpu":
        monkeypatch.setattr(epfuse.api, "target_of", lambda device: Target.GFX950)
        monkeypatch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[Target.GFX950])
    return make_case(device, TOKENS, HIDDEN, INTERMEDIATE, top_k=TOP_K, scale=4.0)


def weights_for(path: Path, case: Case) -> ExpertWeights:
    if path in (Path.BF16, Path.REFERENCE):
        return case.weights
    mxfp8 = ExpertWeights.quantize(case.weights)
    if path is not Path.BLOCK_FP8:
        return mxfp8
    w13, w2 = mxfp8.mxfp8_experts.w13, mxfp8.mxfp8_experts.w2
    return ExpertWeights.block_fp8(w13.values, w13.scales, w2.values, w2.scales)


def call(case: Case, path: Path, **changes: Any) -> torch.Tensor:
    weights = weights_for(path, case)
    return fused_experts(case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, path=path, **changes)


def size_of(path: Path, tokens: int = TOKENS) -> ScratchSize:
    return scratch_size(path, tokens, TOP_K, HIDDEN, INTERMEDIATE)


def buffers(size: ScratchSize, like: torch.Tensor, spare: int = 0) -> Scratch:
    """Full of NaN, with ``spare`` more elements at their ends."""
    return Scratch(
        like.new_full((size.y + spare,), torch.nan),
        like.new_full((size.routed + spare,), torch.nan),
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_and_not_a_byte_more(path: Path, case: Case) -> None:
    expected = call(case, path)
    size = size_of(path)
    scratch = buffers(size, case.hidden, spare=64)
    for buffer, used in ((scratch.y, size.y), (scratch.routed, size.routed)):
        buffer[used:] = GUARD
    assert torch.equal(call(case, path, scratch=scratch), expected)
    for buffer, used in ((scratch.y, size.y), (scratch.routed, size.routed)):
        assert (buffer[used:] == GUARD).all()
        assert not buffer[:used].isnan().all()
    assert torch.equal(call(case, path, scratch=scratch), expected)  # after a call its content is nobody's


@pytest.mark.parametrize("path", PATHS)
def test_out_may_overlap_y(path: Path, case: Case) -> None:
    size = size_of(path)
    common = case.hidden.new_full((max(size.y, case.hidden.numel()),), torch.nan)
    out = common[: case.hidden.numel()].view_as(case.hidden)
    scratch = Scratch(common[: size.y], buffers(size, case.hidden).routed)
    assert call(case, path, out=out, scratch=scratch) is out
    assert torch.equal(out, call(case, path))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_are_allocated(path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call still allocates is its route table: integers, fewer bytes than one row per route."""
    scratch, out = buffers(size_of(path), case.hidden), torch.empty_like(case.hidden)
    allocated: list[torch.Tensor] = []
    empty = torch.empty

    def recorded(*size: Any, **options: Any) -> torch.Tensor:
        allocated.append(empty(*size, **options))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    weights = weights_for(path, case)
    allocated.clear()
    fused_experts(
        case.hidden,
        weights,
        case.topk_weights,
        case.topk_ids,
        case.expert_map,
        path=path,
        out=out,
        scratch=scratch,
    )
    assert allocated
    assert {tensor.dtype for tensor in allocated} == {torch.int32}


@pytest.mark.parametrize("path", [Path.W8A8, Path.BLOCK_FP8])
def test_atomic_sums_use_it_too(path: Path, case: Case) -> None:
    scratch = buffers(size_of(path), case.hidden)
    got = call(case, path, combine=Combine.ATOMIC, scratch=scratch)
    torch.testing.assert_close(got.float(), call(case, path).float(), rtol=2**-6, atol=2**-6)


def test_sizes() -> None:
    assert scratch_size(Path.BF16, 8192, 4, 6144, 3072) == ScratchSize(8192 * 4 * 3072, 8192 * 4 * 6144)
    assert scratch_size(Path.W8A16, 1, 4, 6144, 3072) == ScratchSize(4 * 3072, 4 * 6144)
    # FP8 values and a byte of scale for 32, counted in elements of two bytes, or few rows in BF16: whatever is more
    assert scratch_size(Path.W8A8, 1, 4, 6144, 3072) == ScratchSize(4 * 3072, 4 * 6144)
    assert scratch_size(Path.W8A8, 1, 1, 6144, 384) == ScratchSize((6144 + 192) // 2, 6144)
    assert scratch_size(Path.REFERENCE, 8, 4, 64, 64) == ScratchSize(0, 0)


@pytest.mark.parametrize("path", Path)
def test_sizes_ascend_with_the_tokens_and_are_covered_by_auto(path: Path) -> None:
    sizes = [size_of(path, tokens) for tokens in range(1, 40)]
    assert sizes == sorted(sizes, key=lambda size: (size.y, size.routed))
    one = size_of(path, 1)
    for tokens, size in enumerate(sizes, start=1):
        assert size.y <= tokens * one.y
        assert size.routed <= tokens * one.routed
        assert size.y <= size_of(Path.AUTO, tokens).y
        assert size.routed <= size_of(Path.AUTO, tokens).routed


def test_the_reference_path_ignores_it() -> None:
    case = make_case(torch.device("cpu"))
    scratch = Scratch(case.hidden.new_empty(0), case.hidden.new_empty(0))
    assert torch.equal(
        call(case, Path.REFERENCE, scratch=scratch),
        call(case, Path.REFERENCE),
    )


def test_what_does_not_fit_is_refused(case: Case) -> None:
    size = size_of(Path.BF16)
    good = buffers(size, case.hidden)
    big = case.hidden.new_empty(size.y + size.routed)
    refused: list[tuple[object, type[Exception], str]] = [
        ((good.y, good.routed), ConfigError, "scratch is a tuple"),
        (Scratch(good.y[:-16], good.routed), ShapeError, f"scratch.y has {size.y - 16} elements.*needs {size.y}"),
        (Scratch(good.y, good.routed[:-16]), ShapeError, "scratch.routed has"),
        (Scratch(good.y.float(), good.routed), DtypeError, r"scratch\.y has dtype torch\.float32"),
        (Scratch(good.y, big[::2]), LayoutError, "scratch.routed has strides"),
        (Scratch(good.y, big[1 : size.routed + 1]), LayoutError, "multiple of 16 bytes"),
        (Scratch(big, big[size.y - 16 :]), LayoutError, r"scratch\.routed shares memory with scratch\.y"),
        (Scratch(case.hidden.new_empty(0).to("meta"), good.routed), DeviceError, r"scratch\.y is on meta"),
    ]
    for scratch, kind, words in refused:
        with pytest.raises(kind, match=words):
            call(case, Path.BF16, scratch=scratch)
    out = good.routed[: case.hidden.numel()].view_as(case.hidden)
    with pytest.raises(LayoutError, match=r"scratch\.routed shares memory with out"):
        call(case, Path.BF16, out=out, scratch=good)
    common = torch.cat([case.hidden.flatten(), good.y])
    hidden = common[: case.hidden.numel()].view_as(case.hidden)
    for name, where in (("y", Scratch(common, good.routed)), ("routed", Scratch(good.y, torch.cat([common] * 4)))):
        source = hidden if name == "y" else where.routed[: hidden.numel()].view_as(hidden)
        with pytest.raises(LayoutError, match=rf"scratch\.{name} shares memory with hidden"):
            fused_experts(
                source,
                case.weights,
                case.topk_weights,
                case.topk_ids,
                case.expert_map,
                path=Path.BF16,
                scratch=where,
            )
