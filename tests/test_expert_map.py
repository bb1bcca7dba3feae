"""ExpertMap refuses everything that is not an injective map onto the local slots."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap
from epfuse.errors import ConfigError, ExpertMapError


def test_contiguous_ranks_partition_the_experts() -> None:
    owners = torch.stack([ExpertMap.contiguous(12, 4, rank).on(torch.device("cpu")) for rank in range(4)])
    assert ((owners >= 0).sum(dim=0) == 1).all()
    assert owners[2].tolist() == [-1] * 6 + [0, 1, 2] + [-1] * 3


def test_any_placement_and_integer_type() -> None:
    for dtype in (torch.int8, torch.int32, torch.int64):
        expert_map = ExpertMap(torch.tensor([2, -1, 0, -1, 1], dtype=dtype))
        assert (expert_map.num_experts, expert_map.num_local) == (5, 3)
        assert expert_map.on(torch.device("cpu")).dtype == torch.int32
    assert ExpertMap(torch.full((4,), -1)).num_local == 0
    assert repr(ExpertMap.all_local(3)) == "ExpertMap(num_experts=3, num_local=3)"


def test_writing_to_the_source_does_not_change_the_map() -> None:
    source = torch.tensor([0, 1, -1], dtype=torch.int32)
    expert_map = ExpertMap(source)
    source.fill_(0)
    assert expert_map.on(torch.device("cpu")).tolist() == [0, 1, -1]


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        expert_map = ExpertMap.contiguous(4, 2, 1)
    assert expert_map.on(torch.device("cpu")).tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([0, 0, 1, 1], "looks like a 0/1 ownership mask"),
        ([1, 1, 1, 1], "looks like a 0/1 ownership mask"),
        ([0, 1, 1, -1], "is not one-to-one onto 0..L-1 (non-negative entries, sorted: [0, 1, 1])"),
        ([0, 2, -1], "is not one-to-one onto 0..L-1"),
        ([0, -2, 1], "holds -2; entries are local slots or -1"),
        ([], "has shape (0,); it must be [E] with E >= 1"),
        ([[0, 1]], "has shape (1, 2); it must be [E]"),
        ([0.0, 1.0], "has dtype torch.float32; it must be integer"),
        ([True, False], "has dtype torch.bool; it must be integer"),
    ],
)
def test_bad_map(entries: list[object], words: str) -> None:
    with pytest.raises(ExpertMapError) as caught:
        ExpertMap(torch.tensor(entries))
    assert words in str(caught.value)


def test_a_list_is_not_a_map() -> None:
    with pytest.raises(ExpertMapError, match=r"expert map is a list; it must be a torch.Tensor \[E\]"):
        ExpertMap([0, 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 4, 0), "num_experts is 10; it must be a positive multiple of ep_size, which is 4"),
        ((0, 1, 0), "num_experts is 0"),
        ((8, 0, 0), "ep_size, which is 0"),
        ((8, 4, 4), "ep_rank is 4; it must be in 0..3"),
        ((8, 4, -1), "ep_rank is -1; it must be in 0..3"),
        ((8.0, 4, 1), "num_experts is 8.0; it must be an integer"),
    ],
)
def test_bad_split(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExpertMap.contiguous(*arguments)
    assert words in str(caught.value)
