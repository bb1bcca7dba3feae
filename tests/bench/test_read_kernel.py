from __future__ import annotations

import torch

from epfuse.bench.kernel import read_kernel


def test_every_word_is_read_once(device: torch.device) -> None:
    words = torch.arange(4 * 3 * 16, dtype=torch.int32, device=device)
    sums = torch.full((4,), -1, dtype=torch.int32, device=device)
    read_kernel[(4,)](words, sums, BLOCK=16, STEPS=3, num_warps=1)
    assert sums.tolist() == words.view(4, -1).sum(dim=1).tolist()
