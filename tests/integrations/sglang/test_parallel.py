"""Ranks in processes of their own: what SGLang's all-reduce makes of their shares is the unsharded layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from epfuse.parallel.launch import Placement, launch_ranks
from tests.integrations.sglang.ep_entries import LAYOUTS, TOKENS, shares

RANKS = 4
CLOSE = 8e-3
"""BF16's roundings in a share, and one for each rank that the sum has more."""


@pytest.mark.parametrize("quantized", [True, False])
def test_the_all_reduce_is_the_unsharded_layer(quantized: bool, tmp_path: Path) -> None:
    found = launch_ranks(
        shares,
        (quantized,),
        ranks=RANKS,
        placement=Placement.CPU,
        log_dir=tmp_path,
        preload=("tests.integrations.sglang.ep_entries",),
    )
    assert len(found) == RANKS
    for layout in LAYOUTS:
        for place in range(len(TOKENS)):
            errors, of_shares = zip(*(of_rank[layout][place] for of_rank in found), strict=True)
            assert max(errors) < CLOSE
            assert max(of_shares) > 0.3  # no rank has the whole layer
