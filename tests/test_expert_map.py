"""ExpertMap refuses everything that is not an injective map onto the local slots."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap
from epfuse.errors import ConfigError, DeviceError, ExpertMapError
from epfuse.expert_map import experts_of_rank


def test_contiguous_ranks_partition_the_experts() -> None:
    owners = torch.stack([ExpertMap.contiguous(12, 4, rank).on(torch.device("cpu")) for rank in range(4)])
    assert ((owners >= 0).sum(dim=0) == 1).all()
    assert owners[2].tolist() == [-1] * 6 + [0, 1, 2] + [-1] * 3


@pytest.mark.parametrize(("experts", "ranks"), [(60, 8), (64, 8), (7, 3), (3, 8), (1, 1)])
def test_the_first_ranks_hold_one_more_where_experts_are_left_over(experts: int, ranks: int) -> None:
    shares = [experts_of_rank(experts, ranks, rank) for rank in range(ranks)]
    assert [expert for share in shares for expert in share] == list(range(experts))
    sizes = [len(share) for share in shares]
    assert sizes == [experts // ranks + 1] * (experts % ranks) + [experts // ranks] * (ranks - experts % ranks)
    for rank, share in enumerate(shares):
        slots = ExpertMap.contiguous(experts, ranks, rank).on(torch.device("cpu"))
        assert slots.tolist() == [share.index(expert) if expert in share else -1 for expert in range(experts)]


def test_numpys_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    assert ExpertMap.contiguous(numpy.int64(7), numpy.int32(3), numpy.uint8(1)).num_local == 2


def test_a_map_for_a_device_without_data() -> None:
    expert_map = ExpertMap.contiguous(6, 4, 1, device="meta")
    assert expert_map.on(torch.device("meta")).shape == (6,)
    assert expert_map.on(torch.device("cpu")).tolist() == [-1, -1, 0, 1, -1, -1]


@pytest.mark.parametrize("device", ["nowhere", "cuda:99999", 3, None])
def test_a_device_that_is_none(device: object) -> None:
    with pytest.raises(DeviceError, match="device is"):
        ExpertMap.contiguous(6, 4, 1, device=device)


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


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(4, dtype=torch.int32, device="meta"), "on meta, which has no entries to check"),
        (torch.eye(4, dtype=torch.int32).to_sparse_csr(), "has layout torch.sparse_csr"),
        (torch.arange(4).to_sparse(), "has layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.arange(4), torch.arange(2)]), "must be a plain tensor"),
        (torch.nested.nested_tensor([torch.arange(4)], layout=torch.jagged), "has layout torch.jagged"),
        (torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8), "has dtype torch.qint8"),
        (torch.zeros(4, dtype=torch.complex64), "has dtype torch.complex64"),
        (torch.zeros(1, dtype=torch.int32).expand(2**40), "with E >= 1, at most"),
    ],
)
def test_what_has_no_entries_is_no_map(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ExpertMapError, match=words):
        ExpertMap(tensor)


def test_a_list_is_not_a_map() -> None:
    with pytest.raises(ExpertMapError, match=r"expert map is a list; it must be a torch.Tensor \[E\]"):
        ExpertMap([0, 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 0), "num_experts is 0; it must be at least 1"),
        ((8, 0, 0), "ep_size is 0; it must be at least 1"),
        ((8, 4, 4), "ep_rank is 4; it must be in 0..3"),
        ((8, 4, -1), "ep_rank is -1; it must be at least 0"),
        ((8.0, 4, 1), "num_experts is 8.0; it must be an integer"),
        ((True, 1, 0), "num_experts is True; it must be an integer"),
        ((8, True, 0), "ep_size is True; it must be an integer"),
        ((8, 1, False), "ep_rank is False; it must be an integer"),
        (("8", 1, 0), "num_experts is '8'; it must be an integer"),
        ((torch.tensor(8), 1, 0), "num_experts is a Tensor; it must be an integer"),
        ((10**400, 1, 0), "num_experts is an integer of 1329 bits; it must be at most"),
        ((2**24 + 1, 1, 0), "num_experts is 16777217; it must be at most 16777216"),
    ],
)
def test_bad_split(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExpertMap.contiguous(*arguments)
    assert words in str(caught.value)
