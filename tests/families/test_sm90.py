"""Default tiles of the Hopper kernels for few rows an expert."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.families.sm90 import SM90
from epfuse.stages.tiles import Sm90Tile
from epfuse.target import Target


def shares_of_down(intermediate: int) -> list[int]:
    """Programs that share a tile of down, in blocks of 8 rows."""
    shape = LayerShape(7168, intermediate, 256, 256, 8)
    kind = CallKind(Path.W8A16, Target.SM90, shape, frozenset({WeightFormat.FRAGMENT}))
    found = []
    for entry in SM90.defaults(kind.on(Path.W8A16, WeightFormat.FRAGMENT)):
        assert isinstance(entry.tiles.down, Sm90Tile)
        assert SM90.fits(entry.tiles.down, WeightFormat.FRAGMENT, entry.tiles.block_m)
        if entry.tiles.block_m == 8:
            found.append(entry.tiles.down.shares)
    return found


def test_no_program_of_down_is_left_with_a_step_or_none() -> None:
    assert set(shares_of_down(256)) == {1}
    assert max(shares_of_down(2048)) == 8
