"""Where the Hopper kernels read at the edges: small layers, more programs than work. On a CPU, in numpy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from epfuse.stages import sm90_gemm, sm90_launch, sm90_layouts
from epfuse.stages.gate_up import kernel_sm90
from epfuse.stages.tiles import Sm90Tile
from epfuse.weights.panels import RowOrder, source_rows
from tests.stages.plain_gluon import numbers, plain

PANEL = 64
FIRST_WAVE = 2 * 132
MOST_TILES = 50


@pytest.mark.parametrize("split_k", [1, 2, 4, 8])
@pytest.mark.parametrize("total", [1, 2, 3, 6, 24, 48])
def test_programs_that_share_a_reduction_stay_in_the_weights(total: int, split_k: int) -> None:
    """Their steps are all steps once; also a program without one reads the scales of its first."""
    block_k, panels, local = 128, 3, 2
    columns, taken = total * block_k, []
    words = local * panels * (columns // 128) * PANEL
    with plain(sm90_gemm, sm90_layouts):
        for split in range(split_k):
            first, steps = (int(value) for value in sm90_gemm.share_of(total, split, split_k))
            taken += range(first, first + steps)
            for panel in range(local * panels):
                at = sm90_gemm.fragment_scale_pointers(
                    first * (block_k // 2), numbers(panel), local * panels - 1, columns, PANEL, block_k // 2
                )
                assert at.min() >= 0
                assert at.max() < words
    assert taken == list(range(total))


@pytest.mark.parametrize("tail_split", [2, 4])
@pytest.mark.parametrize(("tiles", "places"), [(0, 7), (1, 7), (6, 7), (7, 7), (8, 7), (40, 7), (40, 1), (3, 924)])
def test_tiles_after_the_last_full_wave_are_shared(tiles: int, places: int, tail_split: int) -> None:
    """Every tile has all its shares once, and those of the tail lie in the memory for them."""
    whole, taken = tiles // places * places, []
    tile = Sm90Tile(64, 128, 0, 4, 3, tail_split=tail_split)
    most = MOST_TILES + tiles  # a call may have fewer tiles than its grid has room for
    with plain(sm90_gemm):
        for program in range(sm90_launch.programs_of(tile, most, places)):
            at, split, shares, slot = (
                int(value) for value in sm90_gemm.tail_tile_of(program, tiles, places, tail_split)
            )
            if at < tiles:
                taken.append((at, split))
                assert shares == (1 if at < whole else tail_split)
                assert at < whole or 0 <= slot < sm90_launch.in_tail(tile, most, places)
    expected = [(at, split) for at in range(tiles) for split in range(1 if at < whole else tail_split)]
    assert taken == expected


@pytest.mark.parametrize("group_m", [0, 2, 4])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("local", "intermediate", "block_n"), [(3, 96, 64), (3, 96, 128), (1, 32, 64), (16, 3072, 128)]
)
def test_guessed_weights_are_weights(local: int, intermediate: int, block_n: int, dense: bool, group_m: int) -> None:
    """No program of the first wave asks for memory outside of w13, however few tiles a small layer has."""
    hidden = 256
    panels = -(-2 * intermediate // PANEL)
    size = local * 2 * intermediate * hidden * 2 if dense else local * panels * PANEL * hidden
    item, asked = (2, []) if dense else (1, [])

    def fetch(pointers: np.ndarray, count: int) -> None:
        asked.append((pointers.astype(np.int64) * item, count))

    with plain(kernel_sm90, sm90_gemm, sm90_layouts, fetch_into_l2=fetch) as language:
        for program in range(FIRST_WAVE + 2):
            language.program = program
            with np.errstate(divide="ignore", over="ignore"):
                kernel_sm90.guess_weights(
                    numbers(0, np.int64), dense, hidden, intermediate, hidden, panels, local, FIRST_WAVE,
                    block_n, group_m, item * hidden,  # as launch_sm90 cuts it to a row
                )  # fmt: skip
    assert asked
    assert min(int(at.min()) for at, _ in asked) >= 0
    assert max(int(at.max()) + count for at, count in asked) <= size
    tiles = local * -(-panels * PANEL // block_n)
    assert len(asked) == min(tiles, FIRST_WAVE)


@pytest.mark.parametrize("block_n", [64, 128, 256])
@pytest.mark.parametrize("intermediate", [48, 96, 160, 2880])
def test_a_bias_is_read_where_its_row_of_weights_was(intermediate: int, block_n: int) -> None:
    """The rows of a tile, in the order in which MXFP8 is packed; what is padding there reads within the expert."""
    experts, tiles = 3, -(-2 * intermediate // block_n)
    row = numbers(np.arange(block_n))
    packed = source_rows(2 * intermediate, RowOrder.GATE_UP).numpy()
    with plain(kernel_sm90):
        for expert in range(experts):
            found = np.concatenate(
                [
                    kernel_sm90.source_rows(numbers(expert), tile * (block_n // 2), row, intermediate)
                    for tile in range(tiles)
                ]
            )
            found -= expert * 2 * intermediate
            real = np.flatnonzero(packed >= 0)
            assert (found[real] == packed[real]).all()
            assert found.min() >= 0
            assert found.max() < 2 * intermediate
