from __future__ import annotations

import torch

from epfuse import ExpertMap, LayerShape
from epfuse.demo.padding import globally_aligned_rows, local_rows, planned_block_m

IDS = torch.tensor([[0, 5], [0, 6], [1, 7], [0, -1]])


def test_a_ranks_rows_are_its_own_routes_rounded_up_by_expert() -> None:
    assert local_rows(IDS, ExpertMap.contiguous(8, 4, 0), 2) == (4, 6)
    assert local_rows(IDS, ExpertMap.contiguous(8, 4, 1), 2) == (0, 0)
    assert local_rows(IDS, ExpertMap.contiguous(8, 4, 2), 2) == (1, 2)


def test_global_alignment_pays_for_every_active_expert() -> None:
    assert globally_aligned_rows(IDS, 8) == 5 * 64


def test_c256s_rows_get_blocks_of_16() -> None:
    m3 = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4)
    assert planned_block_m(torch.device("cpu"), m3, tokens=216) == 16
