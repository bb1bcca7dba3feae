"""The layer on packed FP8 rows: its stages and its memory; off a GPU with PyTorch in place of the Hopper GEMMs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import epfuse.stages.down.launch_sm90_fp8 as down_module
import epfuse.stages.gate_up.launch_sm90_fp8 as gate_up_module
import epfuse.stages.gate_up_down.launch_sm90_fp8_rows as rows_module
from epfuse import ExpertWeights, Path, Scratch, SwiGLUOAI, Target, scratch_size
from epfuse.config import Activation, WeightFormat, silu_gate
from epfuse.errors import ConfigError
from epfuse.families.family import Stage
from epfuse.families.sm90_fp8 import each_gemm
from epfuse.families.sm90_fp8_rows import both_gemms
from epfuse.numerics.e8m0 import decode_scales
from epfuse.reference import run_reference
from epfuse.stages.activation_reference import swiglu_oai
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90PersistentTile, Sm90RowsTile
from epfuse.tuning.calls import bind_stage, layer_call
from epfuse.verify.suite import poisoned_memory, same_bits
from tests.cases import ROUTINGS, Case, make_case, run_in_tiles, snr_db

TILE = Sm90PersistentTile(192, 128, 0, 4, 4, parts=1)
TILES = LayerTiles(16, TILE, TILE)
MANY = LayerTiles.both(128, Sm90RowsTile(256, 128, 4, 4, 4))
FLOOR = 24.0
"""dB, as in test_portable_fp8.py."""


seen: list[object] = []
"""What down was told of lone tokens."""


def rows_by_expert(routes):
    """``(expert, the slice of its packed rows, its routes)`` of each active expert."""
    first = 0
    for expert, found in routes.groups():
        yield expert, slice(first, first + found.numel()), found
        first += found.numel()


def unchanged(rows: FP8Rows, call) -> None:
    """The GEMM reads its rows until it has finished: what it writes may not lie there."""
    before = rows.values.view(torch.uint8).clone(), rows.scales.clone()
    call()
    assert torch.equal(rows.values.view(torch.uint8), before[0])
    assert torch.equal(rows.scales, before[1])


def gate_up(x, w13, routes, activation, tile, out=None, bias=None):
    if out is None:
        out = torch.full((routes.num_routes, w13.rows // 2), torch.nan, dtype=torch.bfloat16)

    def run() -> None:
        numbers = x.dequantize()
        for expert, rows, _ in rows_by_expert(routes):
            sums = numbers[rows] @ w13.matrix(expert, torch.float32).T
            sums = sums if bias is None else sums + bias[expert]
            out[rows] = swiglu_oai(sums.bfloat16().float(), activation).bfloat16()

    unchanged(x, run)
    return out


def down(y, w2, routes, topk_weights, tile, out=None, lone=None, bias=None):
    seen.append(lone)
    if out is None:
        out = torch.full((routes.num_routes, w2.rows), torch.nan, dtype=torch.bfloat16)

    def run() -> None:
        numbers = y.dequantize()
        for expert, rows, found in rows_by_expert(routes):
            sums = numbers[rows] @ w2.matrix(expert, torch.float32).T
            sums = (sums if bias is None else sums + bias[expert]) * topk_weights.view(-1)[found, None]
            alone = torch.zeros(found.numel(), dtype=torch.bool) if lone is None else lone.of_row[rows] >= 0
            out[rows] = torch.where(alone[:, None], torch.nan, sums).bfloat16()
            if lone is not None:
                lone.out[lone.of_row[rows][alone].long()] = sums[alone].bfloat16()

    unchanged(y, run)
    return out


def both(x, w13, w2, routes, topk_weights, activation, tile, y, out, lone=None, down_bias=None):
    """An expert at a time, as the kernel a block: what down stores may lie where x was of the same one alone."""
    seen.append(lone)
    for expert, rows, found in rows_by_expert(routes):
        if w13 is not None:
            before = y.scales.clone()
            numbers = x.values[rows].float() * decode_scales(x.scales[rows], torch.float32)
            sums = numbers @ w13.matrix(expert, torch.float32).T
            results = swiglu_oai(sums.bfloat16().float(), activation)
            scales = decode_scales(y.scales[rows], torch.float32)
            assert (results.abs() <= 448 * scales).all()
            y.values[rows] = (results / scales).to(torch.float8_e4m3fn)
            assert torch.equal(y.scales, before)
        if w2 is not None:
            numbers = y.values[rows].float() * decode_scales(y.scales[rows], torch.float32)
            sums = numbers @ w2.matrix(expert, torch.float32).T
            sums = (sums if down_bias is None else sums + down_bias[expert]) * topk_weights.view(-1)[found, None]
            alone = torch.zeros(found.numel(), dtype=torch.bool) if lone is None else lone.of_row[rows] >= 0
            out[rows] = torch.where(alone[:, None], torch.nan, sums).bfloat16()
            if lone is not None:
                lone.out[lone.of_row[rows][alone].long()] = sums[alone].bfloat16()


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with the GEMMs."""
    if device.type == "cpu":
        monkeypatch.setattr(gate_up_module, "launch_gate_up_sm90_fp8", gate_up)
        monkeypatch.setattr(down_module, "launch_down_sm90_fp8", down)
        monkeypatch.setattr(rows_module, "launch_both", both)
        monkeypatch.setattr(rows_module, "launch_gate_up", gate_up)
        monkeypatch.setattr(rows_module, "launch_down", lambda *operands, activation: down(*operands))
    elif torch.version.hip is not None:
        pytest.skip("a Hopper kernel")
    return device


def run(
    case: Case,
    weights: ExpertWeights,
    out: torch.Tensor,
    scratch: Scratch | None = None,
    activation: Activation | None = None,
    tiles: LayerTiles = TILES,
) -> torch.Tensor:
    with poisoned_memory():
        return run_in_tiles(
            Path.W8A8, WeightFormat.ROW_FP8, tiles, case, weights, out=out, scratch=scratch, activation=activation
        )


@pytest.mark.parametrize("activation", [SwiGLUOAI(), silu_gate()], ids=["bounded", "unbounded"])
@pytest.mark.parametrize(
    ("tiles", "hidden", "intermediate", "routing", "bias"),
    [(TILES, *size, routing, False) for size in [(160, 96), (96, 160)] for routing in ROUTINGS]
    + [(TILES, 160, 96, "padding_ids", True)]
    + [(MANY, 224, 160, routing, False) for routing in ROUTINGS],
)
def test_against_the_oracle_in_any_memory(
    hopper, tiles: LayerTiles, hidden: int, intermediate: int, routing: str, bias: bool, activation: Activation
) -> None:
    case = make_case(hopper, 9, hidden, intermediate, routing=routing, scale=4.0)
    dense, biases = case.weights.dense_experts, {}
    if bias:
        for name, stack in (("gate_up_bias", dense.w13), ("down_bias", dense.w2)):
            biases[name] = torch.randn(stack.shape[:2], generator=torch.Generator().manual_seed(3)).to(hopper)
    weights = ExpertWeights.quantize(ExpertWeights(case.weights.formats, **biases)).prepare(Target.SM90, Path.W8A8)
    call = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, activation)
    want = run_reference(*call, compute=torch.float64)
    got = run(case, weights, torch.full_like(case.hidden, torch.nan), None, activation, tiles)
    empty = want.abs().sum(1) == 0
    assert not got[empty].any()
    assert empty.all() or snr_db(got, want) > FLOOR

    size = scratch_size(Path.W8A8, 9, 4, hidden, intermediate)
    common = torch.full((max(size.y, case.hidden.numel()) + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    routed = torch.full((size.routed + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    scratch = Scratch(common[: size.y], routed[: size.routed])
    own = run(case, weights, torch.full_like(case.hidden, torch.nan), scratch, activation, tiles)
    assert same_bits(own, got)
    shared = run(case, weights, common[: case.hidden.numel()].view_as(case.hidden), scratch, activation, tiles)
    assert same_bits(shared, got)
    assert common[-16:].isnan().all()
    assert routed[-16:].isnan().all()


def test_another_tile_is_refused(hopper) -> None:
    case = make_case(hopper, 9, 160, 96)
    weights = ExpertWeights.quantize(case.weights).prepare(Target.SM90, Path.W8A8)
    portable = GemmTile(128, 128, 0, 4, 2)
    with pytest.raises(ConfigError, match="read row_fp8 weights take Sm90Tile or Sm90RowsTile or Sm90PersistentTile"):
        run_in_tiles(Path.W8A8, WeightFormat.ROW_FP8, LayerTiles(16, portable, portable), case, weights)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_can_run_again_alone(hopper, stage: Stage) -> None:
    """As the tuner times it: what the call left is there still, and the call was right."""
    case = make_case(hopper, 9, 160, 96)
    weights = ExpertWeights.quantize(case.weights).prepare(Target.SM90, Path.W8A8)
    want = run(case, weights, torch.empty_like(case.hidden))
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    call = layer_call(WeightFormat.ROW_FP8, weights, *operands)
    seen.clear()
    step = bind_stage(Path.W8A8, WeightFormat.ROW_FP8, TILES, call, stage)
    assert same_bits(call.out, want)
    step()
    step()
    assert None not in seen  # the kernel that a call compiles


@pytest.mark.parametrize("scale", [0.003, 0.1, 1.0, 8.0])
def test_a_bound_in_place_of_the_largest_value_costs_no_accuracy(hopper, scale: float) -> None:
    """Rows of any length, between GEMMs that are one launch and that are two."""
    case = make_case(hopper, 40, 512, 256, scale=scale)
    weights = ExpertWeights.quantize(case.weights).prepare(Target.SM90, Path.W8A8)
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    call = layer_call(WeightFormat.ROW_FP8, weights, *operands)
    want = run_reference(case.hidden, weights, *operands[1:], compute=torch.float64)
    errors = []
    launch_down = partial(rows_module.launch_down, activation=call.activation)
    two = each_gemm(call, MANY, rows_module.launch_gate_up, launch_down)
    for steps in (two, both_gemms(call, MANY, rows_module.launch_both)):
        call.out.fill_(torch.nan)
        for _, launch in steps.launches:
            launch()
        errors.append((call.out.double() - want).norm() / want.norm())
    assert 0 < errors[1] < 1.02 * errors[0]
