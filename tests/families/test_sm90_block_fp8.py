"""The layer on packed FP8 rows and block FP8 weights: its stages, memory, refusals; off a GPU PyTorch multiplies."""

from __future__ import annotations

import pytest
import torch

import epfuse.stages.down.launch_sm90_block_fp8 as down_module
import epfuse.stages.gate_up.launch_sm90_block_fp8 as gate_up_module
from epfuse import ExpertWeights, LayerShape, Path, Scratch, SwiGLUOAI, Target, scratch_size
from epfuse.config import MINIMAX_M3_EP8, Combine, WeightFormat
from epfuse.errors import ConfigError, LayoutError
from epfuse.families.family import CallKind, Family, Stage
from epfuse.families.portable_fp8 import PORTABLE_FP8
from epfuse.families.registry import serving, why_portable
from epfuse.families.sm90 import SM90
from epfuse.families.sm90_block_fp8 import BLOCK_FP8_TILES, SM90_BLOCK_FP8
from epfuse.policy import decide
from epfuse.reference import run_reference
from epfuse.stages.activation_reference import activated
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90BlockTile
from epfuse.tuning.calls import bind_stage, layer_call
from epfuse.verify.suite import poisoned_memory, same_bits
from epfuse.weights.block_fp8 import BlockFP8, BlockFP8Experts
from tests.cases import Case, make_case, moved, run_in_tiles, snr_db
from tests.families.test_sm90_fp8 import down, rows_by_expert, unchanged

TILES = LayerTiles(16, Sm90BlockTile(256, 128, 0, 4, 4), Sm90BlockTile(128, 128, 0, 4, 4))
PORTABLE_TILES = LayerTiles.both(16, GemmTile(128, 128, 0, 4, 2))
FLOOR = 24.0
"""dB, as in test_portable_fp8.py."""


def gate_up(x, w13, routes, activation, tile, out, bias=None):
    def run() -> None:
        numbers = x.dequantize()
        for expert, rows, _ in rows_by_expert(routes):
            sums = numbers[rows] @ w13.matrix(expert, torch.float32).T
            sums = sums if bias is None else sums + bias[expert]
            made = quantize(activated(sums.bfloat16().float(), activation), out.group)
            out.values[rows], out.scales[rows] = made.values, made.scales

    unchanged(x, run)
    return out


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with both GEMMs."""
    if device.type == "cpu":
        monkeypatch.setattr(gate_up_module, "launch_gate_up_sm90_block_fp8", gate_up)
        monkeypatch.setattr(down_module, "launch_down_sm90_block_fp8", down)
    elif torch.version.hip is not None:
        pytest.skip("a Hopper kernel")
    return device


def in_blocks(case: Case, **biases: torch.Tensor) -> ExpertWeights:
    dense = case.weights.dense_experts
    return ExpertWeights((BlockFP8Experts(BlockFP8.quantize(dense.w13), BlockFP8.quantize(dense.w2)),), **biases)


def run(case: Case, weights: ExpertWeights, out: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    with poisoned_memory():
        return run_in_tiles(Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, TILES, case, weights, out=out, scratch=scratch)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "routing", "bias"),
    [
        (160, 128, "uniform", False),
        (160, 128, "nothing_local", False),
        (160, 128, "duplicates", False),
        (288, 256, "padding_ids", True),
    ],
)
def test_against_the_oracle_in_any_memory(hopper, hidden: int, intermediate: int, routing: str, bias: bool) -> None:
    """And bit for bit the portable kernels' but for rows whose sums PyTorch adds up in another order."""
    case = make_case(hopper, 9, hidden, intermediate, routing=routing, scale=4.0)
    dense, biases = case.weights.dense_experts, {}
    if bias:
        for name, stack in (("gate_up_bias", dense.w13), ("down_bias", dense.w2)):
            biases[name] = torch.randn(stack.shape[:2], generator=torch.Generator().manual_seed(3)).to(hopper)
    weights = in_blocks(case, **biases)
    call = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    want = run_reference(*call, compute=torch.float64)
    got = run(case, weights, torch.full_like(case.hidden, torch.nan))
    empty = want.abs().sum(1) == 0
    assert not got[empty].any()
    assert empty.all() or snr_db(got, want) > FLOOR
    twin = run_in_tiles(Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, PORTABLE_TILES, case, weights)
    assert empty.all() or snr_db(got, twin.double()) > 40.0

    size = scratch_size(Path.BLOCK_FP8, 9, 4, hidden, intermediate)
    common = torch.full((max(size.y, case.hidden.numel()) + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    routed = torch.full((size.routed + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    scratch = Scratch(common[: size.y], routed[: size.routed])
    own = run(case, weights, torch.full_like(case.hidden, torch.nan), scratch)
    assert same_bits(own, got)
    shared = run(case, weights, common[: case.hidden.numel()].view_as(case.hidden), scratch)
    assert same_bits(shared, got)
    assert common[-16:].isnan().all()
    assert routed[-16:].isnan().all()


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_can_run_again_alone(hopper, stage: Stage) -> None:
    """As the tuner times it: what the call left is there still, and the call was right."""
    case = make_case(hopper, 9, 160, 128)
    weights = in_blocks(case)
    want = run(case, weights, torch.empty_like(case.hidden))
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    call = layer_call(WeightFormat.BLOCK_FP8, weights, *operands)
    step = bind_stage(Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, TILES, call, stage)
    assert same_bits(call.out, want)
    step()
    step()
    assert same_bits(call.out, want)


def calls(shape: LayerShape, combine: Combine = Combine.DETERMINISTIC) -> CallKind:
    return CallKind(Path.BLOCK_FP8, Target.SM90, shape, frozenset({WeightFormat.BLOCK_FP8}), combine=combine)


def test_sizes_that_it_has_no_kernels_for_run_on_the_portable_ones() -> None:
    """Where gate and up rows share a scale, a row of weights can't be copied, or rows are less than a group."""
    for hidden, intermediate in ((6144, 192), (6152, 256), (112, 256)):
        kind = calls(LayerShape(hidden, intermediate, 128, 16, 4))
        assert serving(kind) == (PORTABLE_FP8,)
        reason = why_portable(kind)
        assert reason is not None
        assert f"not {intermediate} and {hidden}" in reason


@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_sums_by_atomics_run_on_the_portable_kernels(tokens: int) -> None:
    """A measured or default tile of kernels that sum in order would sum in order."""
    shape = LayerShape(256, 128, 16, 4, 3)
    assert decide(calls(shape), tokens).family is SM90_BLOCK_FP8
    assert decide(calls(shape, Combine.ATOMIC), tokens).family is PORTABLE_FP8


@pytest.mark.parametrize(("tokens", "family"), [(1, SM90), (4, SM90), (5, SM90_BLOCK_FP8)])
def test_few_rows_stay_in_bf16(tokens: int, family: Family) -> None:
    """Up to 0.125 rows an expert; a call's memory has room for either."""
    kind = calls(MINIMAX_M3_EP8)
    decision = decide(kind, tokens)
    assert decision.family is family
    assert decision.tiles is not None
    assert family.fits(decision.tiles.gate_up, WeightFormat.BLOCK_FP8, decision.tiles.block_m)
    room = scratch_size(Path.BLOCK_FP8, tokens, 4, 6144, 3072)
    needed = family.scratch(tokens, 4, 6144, 3072)
    assert room.y >= needed.y
    assert room.routed >= needed.routed


@pytest.mark.parametrize("which", ["w13", "w2"])
@pytest.mark.parametrize("family", [SM90, SM90_BLOCK_FP8], ids=lambda family: family.name)
def test_weights_that_begin_between_the_kernels_copies_are_named(family: Family, which: str) -> None:
    """They are read where a loader left them; compiling for them would fail, or a check of Triton's."""
    case = make_case(torch.device("cpu"), 1, 256, 128)
    experts = in_blocks(case).kept[WeightFormat.BLOCK_FP8]
    stacks = {"w13": experts.w13, "w2": experts.w2}
    stacks[which] = BlockFP8(moved(stacks[which].values, 8), moved(stacks[which].scales, 4))
    weights = ExpertWeights((BlockFP8Experts(**stacks),))
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    tiles = family.defaults(calls(LayerShape(256, 128, 16, 4, 4)))[0].tiles
    assert family.steps(layer_call(WeightFormat.BLOCK_FP8, in_blocks(case), *operands), tiles).launches
    with pytest.raises(LayoutError, match=rf"{which}.*begin at .*8; .*multiples of 16"):
        family.steps(layer_call(WeightFormat.BLOCK_FP8, weights, *operands), tiles)


def test_default_tiles_fit() -> None:
    for entry in BLOCK_FP8_TILES:
        for tile in (entry.tiles.gate_up, entry.tiles.down):
            assert SM90_BLOCK_FP8.fits(tile, WeightFormat.BLOCK_FP8, entry.tiles.block_m)


@pytest.mark.parametrize("sizes", [(64, 128, 4), (256, 64, 4), (256, 128, 8)])
def test_other_tiles_are_refused(sizes: tuple[int, int, int]) -> None:
    block_n, block_k, warps = sizes
    with pytest.raises(ConfigError, match="block_n is 128 or 256, block_k 128 and num_warps 4"):
        Sm90BlockTile(block_n, block_k, 0, warps, 4)


def test_gate_up_needs_gate_and_up_rows_in_one_tile() -> None:
    narrow = Sm90BlockTile(128, 128, 0, 4, 4)
    assert not SM90_BLOCK_FP8.fits(Sm90BlockTile(256, 128, 0, 4, 10), WeightFormat.BLOCK_FP8, 128)
    with pytest.raises(ConfigError, match="gate_up"):
        LayerTiles(16, narrow, narrow)
