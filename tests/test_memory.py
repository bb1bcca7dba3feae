"""What a call writes lies where nothing else does: every operand against every other one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import epfuse.api
from epfuse import ExpertMap, ExpertWeights, Path, Scratch, Target, fused_experts, scratch_size
from epfuse.errors import LayoutError
from epfuse.families.family import Steps
from epfuse.families.portable import Portable
from epfuse.operands import overlaps
from epfuse.stages.route.table import RouteTable
from epfuse.target import REFERENCE_DEVICE

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS = 4, 2, 32, 32, 2
SIZE = scratch_size(Path.W8A16, TOKENS, TOP_K, HIDDEN, INTERMEDIATE)
ALIGN = 64
READ = ("hidden", "topk_weights", "topk_ids", "w13", "w13's scales", "w2", "w2's scales")
BYTES = {
    "hidden": TOKENS * HIDDEN * 2,
    "topk_weights": TOKENS * TOP_K * 4,
    "topk_ids": TOKENS * TOP_K * 8,
    "w13": EXPERTS * 2 * INTERMEDIATE * HIDDEN,
    "w13's scales": EXPERTS * 2 * INTERMEDIATE * HIDDEN // 32,
    "w2": EXPERTS * HIDDEN * INTERMEDIATE,
    "w2's scales": EXPERTS * HIDDEN * INTERMEDIATE // 32,
    "out": TOKENS * HIDDEN * 2,
    "scratch.y": SIZE.y * 2,
    "scratch.routed": SIZE.routed * 2,
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A call that kernels would run; none is launched."""
    launched: list[str] = []
    monkeypatch.setattr(epfuse.api, "target_of", lambda device: Target.GFX950)
    monkeypatch.setattr(epfuse.api, "device_name", lambda device: REFERENCE_DEVICE[Target.GFX950])
    nothing = Steps(RouteTable.empty(1, 1, 16, torch.device("cpu")), (("route", lambda: launched.append("kernels")),))
    monkeypatch.setattr(Portable, "steps", lambda self, call, tiles: nothing)
    return launched


class Memory:
    """One storage in which all operands of a call lie, at any offsets."""

    def __init__(self, offsets: dict[str, int]) -> None:
        self.offsets = offsets
        self.storage = torch.zeros(max(offsets[name] + BYTES[name] for name in BYTES) + ALIGN, dtype=torch.uint8)
        self.start = -self.storage.data_ptr() % ALIGN  # offsets count from an aligned address

    def view(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        begin = self.start + self.offsets[name]
        return self.storage[begin : begin + BYTES[name]].view(dtype).view(*shape)

    def call(self) -> None:
        e4m3, u8 = torch.float8_e4m3fn, torch.uint8
        weights = ExpertWeights.mxfp8(
            self.view("w13", e4m3, EXPERTS, 2 * INTERMEDIATE, HIDDEN),
            self.view("w13's scales", u8, EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32),
            self.view("w2", e4m3, EXPERTS, HIDDEN, INTERMEDIATE),
            self.view("w2's scales", u8, EXPERTS, HIDDEN, INTERMEDIATE // 32),
        )
        fused_experts(
            self.view("hidden", torch.bfloat16, TOKENS, HIDDEN),
            weights,
            self.view("topk_weights", torch.float32, TOKENS, TOP_K),
            self.view("topk_ids", torch.int64, TOKENS, TOP_K),
            ExpertMap.all_local(EXPERTS),
            out=self.view("out", torch.bfloat16, TOKENS, HIDDEN),
            scratch=Scratch(
                self.view("scratch.y", torch.bfloat16, SIZE.y), self.view("scratch.routed", torch.bfloat16, SIZE.routed)
            ),
        )


def side_by_side() -> dict[str, int]:
    offsets, end = {}, 0
    for name, size in BYTES.items():
        offsets[name] = end
        end += -(-size // ALIGN) * ALIGN
    return offsets


def may_share(first: str, second: str) -> bool:
    """Tensors that are only read; and y may lie in out."""
    return {first, second} <= set(READ) or {first, second} == {"out", "scratch.y"}


def clash(offsets: dict[str, int]) -> bool:
    """Byte by byte, by another rule than the one under test."""
    bytes_of = {name: set(range(offsets[name], offsets[name] + BYTES[name])) for name in BYTES}
    names = list(BYTES)
    return any(
        bytes_of[first] & bytes_of[second] and not may_share(first, second)
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    )


@pytest.mark.parametrize("written", ["out", "scratch.y", "scratch.routed"])
@pytest.mark.parametrize("other", BYTES)
@pytest.mark.parametrize("end", ["first", "last"])
def test_one_byte_in_common_is_refused_by_name(written: str, other: str, end: str, kernels: list[str]) -> None:
    if other == written:
        return
    offsets = side_by_side()
    room = sum(BYTES.values()) * 2
    offsets[written] = room
    if end == "first":  # the first bytes of what is written are the last ones of the other
        offsets[other] = room - -(-BYTES[other] // ALIGN) * ALIGN + ALIGN
    else:
        offsets[other] = room + (BYTES[written] - 1) // ALIGN * ALIGN
    assert clash(offsets) is not may_share(written, other)
    if may_share(written, other):
        Memory(offsets).call()
        assert kernels == ["kernels"]
        return
    with pytest.raises(LayoutError, match=r"shares memory with .*; it must be memory of its own") as caught:
        Memory(offsets).call()
    assert written in str(caught.value)
    assert other in str(caught.value)
    assert not kernels


def test_neighbours_share_nothing(kernels: list[str]) -> None:
    Memory(side_by_side()).call()
    assert kernels == ["kernels"]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_placement_runs_if_and_only_if_nothing_is_written_over_something(data: st.DataObject) -> None:
    names = list(BYTES)
    offsets = side_by_side()
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        offsets[name] = ALIGN * data.draw(st.integers(0, sum(BYTES.values()) // ALIGN))
    if clash(offsets):
        with pytest.raises(LayoutError, match="shares memory with"):
            Memory(offsets).call()
    else:
        Memory(offsets).call()


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights", "w13", "expert_map"])
def test_the_reference_path_writes_over_nothing_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where there is nothing to do: zeros would be written over them."""
    monkeypatch.undo()
    for local in (2, 0):
        expert_map = ExpertMap(torch.tensor([0, 1] if local else [-1, -1]))
        out = torch.zeros(32, 2)
        ids, scores, w13 = torch.zeros(32, 1, dtype=torch.int32), torch.zeros(32, 1), torch.zeros(2, 2, 2)
        if name == "topk_ids":
            ids = out.view(torch.int32).view(-1)[32:].view(32, 1)
        elif name == "topk_weights":
            scores = out.view(-1)[32:].view(32, 1)
        elif name == "w13":
            w13 = out.view(-1)[: 2 * 2 * 2].view(2, 2, 2)
        else:
            out = expert_map.on(out.device).view(torch.float32).view(1, 2)
            ids, scores = ids[:1], scores[:1]
        if name == "w13" and local == 0:
            continue
        weights = ExpertWeights.dense(w13[:local], torch.zeros(2, 2, 1)[:local])
        hidden = torch.zeros(out.shape)
        with pytest.raises(LayoutError, match=f"out shares memory with {name}"):
            fused_experts(hidden, weights, scores, ids, expert_map, out=out)


def test_tensors_without_memory_share_none() -> None:
    first = torch.empty(4, device="meta")
    assert not overlaps(first, first)
    same = torch.empty(4)
    assert overlaps(same, same[3:])
    assert not overlaps(same, same[4:])
    assert not overlaps(same[2:2], same)


def test_weights_that_share_memory_are_not_packed_in_place() -> None:
    scales = torch.full((1, 128, 4), 127, dtype=torch.uint8)
    memory = torch.zeros(128 * 128 + 64, dtype=torch.uint8)
    w13 = memory[: 128 * 128].view(torch.float8_e4m3fn).view(1, 128, 128)
    w2 = memory[128 * 64 + 64 :].view(torch.float8_e4m3fn).view(1, 128, 64)
    shared = ExpertWeights.mxfp8(w13, scales, w2, scales[..., :2].clone())
    for target in (Target.SM90, Target.GFX942):
        with pytest.raises(LayoutError, match="w2 shares memory with w13"):
            shared.prepare(target)
