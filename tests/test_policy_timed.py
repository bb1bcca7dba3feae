"""Where the time model of tiles overrules the nearest row, and where it may not."""

from __future__ import annotations

import pytest

from epfuse.compiled.layer import token_counts
from epfuse.config import GPT_OSS_120B, MINIMAX_M3, MINIMAX_M3_EP8, LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.measured.fits import fit_of
from epfuse.measured.lookup import sources
from epfuse.policy import decide
from epfuse.policy.decision import TileChoice
from epfuse.policy.tiles import nearest_ranges, tile_ranges
from epfuse.policy.timed import candidates, overruled
from epfuse.stages.route.table import max_padded
from epfuse.stages.tiles import Sm90Tile
from epfuse.target import Target

H200 = "NVIDIA H200"
ASKED = (Target.SM90, H200, Path.W8A16, WeightFormat.FRAGMENT)
SHAPES = (
    MINIMAX_M3_EP8,
    MINIMAX_M3.rank_of(tp_size=8),
    GPT_OSS_120B,
    LayerShape(7168, 2048, 256, 32, 8),
    LayerShape(6144, 16384, 8, 4, 2),
    LayerShape(2048, 768, 128, 128, 8),
)


def both(shape: LayerShape) -> tuple[list[tuple[int, TileChoice]], list[tuple[int, TileChoice]]]:
    kind = CallKind(Path.W8A16, Target.SM90, shape, frozenset({WeightFormat.FRAGMENT}), device_name=H200)
    return nearest_ranges(kind), tile_ranges(kind)


def at(ranges: list[tuple[int, TileChoice]], tokens: int) -> TileChoice:
    return next(choice for first, choice in reversed(ranges) if first <= tokens)


def test_a_prefill_between_the_rows_is_not_padded_to_the_next() -> None:
    """186 rows an expert would be multiplied as 256 or more in the block of the nearest row."""
    near, ranges = both(LayerShape(4096, 1536, 128, 16, 8))
    assert at(near, 2972).tiles.block_m > 256
    assert at(ranges, 2972).tiles.block_m < 200
    assert at(ranges, 2972).source.startswith("Predicted to take 0.")
    assert "by the time model of NVIDIA H200 (error" in at(ranges, 2972).source
    assert at(ranges, 2972).measured_us is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_measured_count_keeps_its_tile(shape: LayerShape) -> None:
    near, ranges = both(shape)
    for source in sources(*ASKED, shape):
        for point in () if source.is_foreign else source.points:
            assert at(ranges, point.tokens).tiles == at(near, point.tokens).tiles == point.tiles
            assert at(ranges, point.tokens).measured_us == point.microseconds


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_that_claims_to_be_exact_is_held_to_the_same_limits(shape: LayerShape) -> None:
    """Shipped errors hide what the limits do: without one the model would overrule at every count."""
    fit = fit_of(*ASKED)
    assert fit is not None
    exact = fit.model_copy(update={"error": 1e-6, "error_other_shape": 1e-6})
    near, measured = both(shape)[0], sources(*ASKED, shape)
    ranges = overruled(near, measured, exact, Target.SM90, shape)
    assert ranges != near
    assert len({choice.tiles for _, choice in ranges} - {choice.tiles for _, choice in near}) <= 3
    for source in measured:
        for point in () if source.is_foreign else source.points:
            assert at(ranges, point.tokens).tiles == point.tiles
    for first, _ in ranges:
        assert at(ranges, first).tiles.packed == at(near, first).tiles.packed


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tiles_are_added_and_none_of_another_kind(shape: LayerShape) -> None:
    near, ranges = both(shape)
    assert len({choice.tiles for _, choice in ranges} - {choice.tiles for _, choice in near}) <= 3
    firsts = [first for first, _ in ranges]
    assert firsts == sorted(set(firsts))
    assert firsts[0] == 1
    for tokens in {*firsts, *(first for first, _ in near)}:
        assert at(ranges, tokens).tiles.packed == at(near, tokens).tiles.packed


def test_a_tile_of_the_smallest_blocks_reaches_as_far_as_any_of_them() -> None:
    """A few small experts want split sums at 0.4 rows an expert, where no layer with rows did."""
    fit = fit_of(*ASKED)
    assert fit is not None
    reach = candidates(fit, Target.SM90, MINIMAX_M3_EP8)
    smallest = {bounds for tiles, bounds in reach.items() if tiles.block_m == 8}
    assert len(smallest) == 1
    ((low, high),) = smallest
    assert low < 0.05 < 2 < high
    assert len({bounds for tiles, bounds in reach.items() if tiles.block_m > 8}) > 3


def test_tiles_of_layers_that_it_is_not_asked_of_are_no_candidates() -> None:
    """Narrow packed tiles of whole steps were best for one wide expert or two alone."""
    fit = fit_of(*ASKED)
    assert fit is not None
    packed = [tiles.gate_up for tiles in candidates(fit, Target.SM90, MINIMAX_M3_EP8) if tiles.packed]
    assert {(tile.block_n, tile.block_k) for tile in packed} == {(192, 128), (128, 64)}


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (LayerShape(7168, 2048, 256, 1, 8), 128),
        (LayerShape(7168, 2048, 256, 4, 8), 405),
        (LayerShape(4096, 1536, 128, 2, 8), 128),
        (LayerShape(6144, 3072, 128, 1, 4), 256),
    ],
)
def test_no_launch_has_many_times_the_programs_that_were_timed(shape: LayerShape, tokens: int) -> None:
    """On a rank with few of many experts nearly all have no tile: the model saw no time in 65536 and 114688 of them."""
    tiles = at(both(shape)[1], tokens).tiles
    blocks = max_padded(tokens * shape.top_k, shape.local_experts, tiles.block_m) // tiles.block_m
    for tile, outputs in ((tiles.gate_up, 2 * shape.intermediate), (tiles.down, shape.hidden)):
        assert isinstance(tile, Sm90Tile)
        assert blocks * -(-outputs // tile.block_n) * tile.split_k < 25_000


def test_what_nothing_was_fitted_to_stays_with_its_rows() -> None:
    for kind in (
        CallKind(Path.W8A16, Target.SM90, MINIMAX_M3_EP8, frozenset({WeightFormat.FRAGMENT}), device_name="NVIDIA H20"),
        CallKind(Path.BF16, Target.SM90, MINIMAX_M3_EP8, device_name=H200),
    ):
        assert tile_ranges(kind) == nearest_ranges(kind)


def test_the_warm_up_reaches_every_choice() -> None:
    formats = frozenset({WeightFormat.FRAGMENT})
    layer = CallKind(Path.W8A16, Target.SM90, MINIMAX_M3_EP8, formats, device_name=H200)
    counts = set(token_counts(layer, 16384))
    reached = {at(both(MINIMAX_M3_EP8)[1], tokens).tiles for tokens in counts}
    every = {choice.tiles for first, choice in both(MINIMAX_M3_EP8)[1] if first <= 16384}
    assert reached == every
    for tokens in range(1, 16385, 97):
        assert decide(layer, tokens).tiles in every
