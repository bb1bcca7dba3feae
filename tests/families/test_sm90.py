"""Default tiles of the Hopper kernels for few rows an expert."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.families.registry import default_ranges
from epfuse.families.sm90 import SM90
from epfuse.measured.lookup import sources
from epfuse.stages.tiles import Sm90Tile, has_few_tiles
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


WIDE = LayerShape(6144, 16384, 8, 1, 2)


def test_one_wide_expert_has_programs_for_the_whole_gpu() -> None:
    """At up to 116 rows an expert each GEMM has 90 programs, of 132 multiprocessors; few tiles are few rows' too."""
    assert has_few_tiles(WIDE)
    formats = frozenset({WeightFormat.FRAGMENT})
    ranges = default_ranges(CallKind(Path.W8A16, Target.SM90, WIDE, formats, device_name="a GPU without rows"))
    few = [entry for entry in ranges if entry.max_rows <= 116]
    assert [entry.max_rows for entry in few] == [4, 12.5, 24, 64, 116]
    for entry in few:
        for tile, outputs in ((entry.tiles.gate_up, 2 * WIDE.intermediate), (entry.tiles.down, WIDE.hidden)):
            assert isinstance(tile, Sm90Tile)
            assert SM90.fits(tile, WeightFormat.FRAGMENT, entry.tiles.block_m)
            assert outputs // tile.block_n * tile.split_k >= 90
    assert all(entry.tiles.packed for entry in ranges if entry.max_rows > 116)


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(6144, 16384, 8, 2, 2),
        LayerShape(4096, 14336, 8, 4, 2),
        LayerShape(2048, 768, 128, 4, 8),
        LayerShape(4096, 1792, 8, 1, 2),
        LayerShape(6144, 3072, 128, 1, 4),
    ],
)
def test_other_layers_have_tiles_enough_or_short_reductions_or_other_ranks_routes(shape: LayerShape) -> None:
    assert not has_few_tiles(shape)


def test_rows_of_one_wide_expert_serve_no_layer_of_many() -> None:
    def shapes(local: int) -> set[int]:
        shape = LayerShape(4096, 14336, 8, local, 2)
        found = sources(Target.SM90, "NVIDIA H200", Path.W8A16, WeightFormat.FRAGMENT, shape)
        return {source.shape.local_experts for source in found}

    assert shapes(1) == shapes(2) == {1, 2}
    assert shapes(4) == set()
