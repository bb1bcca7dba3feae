from __future__ import annotations

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


def test_refuses_experts_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        EPGroup(0, 3).expert_map(8)


def test_current_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        EPGroup.current()
