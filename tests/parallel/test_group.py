from __future__ import annotations

from typing import Any

import pytest
import torch

from epfuse.errors import ConfigError
from epfuse.parallel.group import EPGroup


def test_a_single_rank_holds_all_and_sums_nothing() -> None:
    group = EPGroup.single()
    assert group.expert_map(6).num_local == 6
    partial = torch.randn(3)
    assert group.all_reduce(partial) is partial


def test_ranks_split_the_experts() -> None:
    slots = torch.stack([EPGroup(rank, 4).expert_map(8).on(torch.device("cpu")) for rank in range(4)])
    assert ((slots >= 0).sum(0) == 1).all()


def test_refuses_a_rank_outside_the_group() -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        EPGroup(4, 4)


@pytest.mark.parametrize(("rank", "size"), [("0", 2), (0, "2"), (True, 2), (0, 1.5), (None, None), (0, 0)])
def test_refuses_what_is_no_rank_or_number_of_ranks(rank: Any, size: Any) -> None:
    with pytest.raises(ConfigError, match="EPGroup"):
        EPGroup(rank, size)


def test_the_first_ranks_hold_one_expert_more() -> None:
    maps = [EPGroup(rank, 3).expert_map(8) for rank in range(3)]
    assert [found.num_local for found in maps] == [3, 3, 2]
    slots = torch.stack([found.on(torch.device("cpu")) for found in maps])
    assert ((slots >= 0).sum(0) == 1).all()


def test_current_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        EPGroup.current()
