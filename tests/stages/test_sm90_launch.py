"""What Hopper's launches describe once in a weight tensor's life."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from epfuse.stages import sm90_launch


@dataclass
class Stack:
    codes: torch.Tensor


def test_weights_are_described_once_and_anew_where_they_lie_elsewhere() -> None:
    stack = Stack(torch.zeros(2, 64 * 128, dtype=torch.uint8))
    first = sm90_launch.weight_lines(stack, 128)
    assert sm90_launch.weight_lines(stack, 128) is first
    assert sm90_launch.weight_lines(stack, 64).block_shape != first.block_shape
    stack.codes.data = torch.ones(2, 64 * 128, dtype=torch.uint8)
    moved = sm90_launch.weight_lines(stack, 128)
    assert moved.base.data_ptr() == stack.codes.data_ptr()
    assert moved.base.data_ptr() != first.base.data_ptr()


def test_what_is_described_goes_with_the_weights() -> None:
    stack = Stack(torch.zeros(1, 64 * 128, dtype=torch.uint8))
    before = len(sm90_launch._lines)
    sm90_launch.weight_lines(stack, 128)
    assert len(sm90_launch._lines) == before + 1
    del stack
    gc.collect()
    assert len(sm90_launch._lines) == before
