"""The layer on packed BF16 rows and dense weights: its stages and its memory; off a GPU with PyTorch for both GEMMs."""

from __future__ import annotations

import pytest
import torch

import epfuse.stages.gate_up_down.launch_dense as launch_module
from epfuse import ExpertWeights, Path, Scratch, SwiGLUOAI, Target, scratch_size
from epfuse.config import MINIMAX_M3_EP8 as M3
from epfuse.config import LayerShape, WeightFormat
from epfuse.families.family import CallKind, Stage
from epfuse.families.sm90 import SM90
from epfuse.families.sm90_dense import SM90_DENSE
from epfuse.policy.call import decide
from epfuse.reference import run_reference
from epfuse.stages.activation_reference import swiglu_oai
from epfuse.stages.down.launch import launch_down
from epfuse.stages.gate_up.launch import launch_gate_up
from epfuse.stages.tiles import LayerTiles, Sm90DenseTile, Sm90Tile
from epfuse.tuning.calls import bind_stage, layer_call
from epfuse.verify.suite import poisoned_memory, same_bits
from tests.cases import ROUTINGS, make_case, run_in_tiles, snr_db
from tests.families.test_sm90_fp8 import rows_by_expert

TILES = LayerTiles.both(32, Sm90DenseTile(256, 64, 0, 4, 4))
FLOOR = 45.0
"""dB: two roundings to BF16 and one before the activation."""
SIZES = [(160, 96), (96, 160)]


def both(x, w13, w2, routes, topk_weights, activation, tile, y, out, lone=None, gate_up_bias=None, down_bias=None):
    """As the kernel: out may be the memory of x, which is read first."""
    for expert, rows, found in rows_by_expert(routes):
        if w13 is not None:
            sums = x[rows].float() @ w13[expert].float().T
            sums = sums if gate_up_bias is None else sums + gate_up_bias[expert]
            y[rows] = swiglu_oai(sums.bfloat16().float(), activation).bfloat16()
        if w2 is not None:
            sums = y[rows].float() @ w2[expert].float().T
            sums = (sums if down_bias is None else sums + down_bias[expert]) * topk_weights.view(-1)[found, None]
            alone = lone.of_row[rows] >= 0
            out[rows] = torch.where(alone[:, None], torch.nan, sums).bfloat16()
            lone.out[lone.of_row[rows][alone].long()] = sums[alone].bfloat16()


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with both GEMMs."""
    if device.type == "cpu":
        monkeypatch.setattr(launch_module, "launch_gate_up_down_dense", both)
    elif torch.version.hip is not None:
        pytest.skip("a Hopper kernel")
    return device


def run(case, weights: ExpertWeights, out: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    with poisoned_memory():
        return run_in_tiles(Path.BF16, WeightFormat.DENSE, TILES, case, weights, out=out, scratch=scratch)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_against_the_oracle_in_any_memory(hopper, hidden: int, intermediate: int, routing: str, bias: bool) -> None:
    case = make_case(hopper, 9, hidden, intermediate, routing=routing, scale=4.0)
    dense, biases = case.weights.dense_experts, {}
    if bias:
        for name, stack in (("gate_up_bias", dense.w13), ("down_bias", dense.w2)):
            biases[name] = torch.randn(stack.shape[:2], generator=torch.Generator().manual_seed(3)).to(hopper)
    weights = ExpertWeights(case.weights.formats, **biases)
    call = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    want = run_reference(*call, compute=torch.float64)
    got = run(case, weights, torch.full_like(case.hidden, torch.nan))
    empty = want.abs().sum(1) == 0
    assert not got[empty].any()
    assert empty.all() or snr_db(got, want) > FLOOR

    size = scratch_size(Path.BF16, 9, 4, hidden, intermediate)
    common = torch.full((max(size.y, case.hidden.numel()) + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    routed = torch.full((size.routed + 16,), torch.nan, dtype=torch.bfloat16, device=hopper)
    scratch = Scratch(common[: size.y], routed[: size.routed])
    assert same_bits(run(case, weights, torch.full_like(case.hidden, torch.nan), scratch), got)
    shared = run(case, weights, common[: case.hidden.numel()].view_as(case.hidden), scratch)
    assert same_bits(shared, got)
    assert common[-16:].isnan().all()
    assert routed[-16:].isnan().all()


def test_weights_that_begin_anywhere(hopper) -> None:
    """Hopper's copies take multiples of 16 bytes; dense weights elsewhere go to the kernels for every GPU."""
    case = make_case(hopper, 9, 96, 64, scale=4.0)
    dense = case.weights.dense_experts
    memory = dense.w2.new_empty(dense.w2.numel() + 1)
    w2 = memory[1:].view(dense.w2.shape)
    w2.copy_(dense.w2)
    weights = ExpertWeights.bf16(dense.w13, w2)
    want = run_reference(
        case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI(), compute=torch.float64
    )
    got = run(case, weights, torch.full_like(case.hidden, torch.nan))
    assert snr_db(got, want) > FLOOR
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    for family, tiles in ((SM90_DENSE, TILES), (SM90, LayerTiles.both(8, Sm90Tile(64, 128, 0, 4, 3)))):
        for given, portable in ((case.weights, False), (weights, True)):
            call = layer_call(WeightFormat.DENSE, given, *operands)
            launches = [step.func for _, step in family.steps(call, tiles).launches]
            assert (launch_gate_up in launches and launch_down in launches) is portable


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_can_run_again_alone(hopper, stage: Stage) -> None:
    """As the tuner times it, on a call without the other stage's weights."""
    case = make_case(hopper, 9, 160, 96)
    want = run(case, case.weights, torch.empty_like(case.hidden))
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    call = layer_call(WeightFormat.DENSE, case.weights, *operands)
    step = bind_stage(Path.BF16, WeightFormat.DENSE, TILES, call, stage)
    assert same_bits(call.out, want)
    step()
    step()


def test_who_runs_dense_weights() -> None:
    kind = CallKind(Path.BF16, Target.SM90, M3, frozenset({WeightFormat.DENSE}), device_name="NVIDIA H200")
    assert [decide(kind, tokens).family.name for tokens in (1, 1024, 2048, 16384)] == ["sm90"] * 2 + ["sm90_dense"] * 2
    odd = LayerShape(hidden=2872, intermediate=2880, experts=128, local_experts=16, top_k=4)
    refusal = SM90_DENSE.accepts(CallKind(Path.BF16, Target.SM90, odd, frozenset({WeightFormat.DENSE})))
    assert refusal == "It takes dense weights with H and I in multiples of 16, not 2872 and 2880."


@pytest.mark.parametrize("block_m", [16, 32, 96, 144, 192, 256, 272, 288, 320])
@pytest.mark.parametrize("block_n", [128, 192, 256])
def test_sums_and_rings_have_room(block_m: int, block_n: int) -> None:
    """Of 128 threads of a consumer each holds so many sums; the ring leaves room for results on their way."""
    most = {128: 320, 192: 272, 256: 192}[block_n]
    tile = Sm90DenseTile(block_n, 64, 1, 4, 3)
    assert SM90_DENSE.fits(tile, WeightFormat.DENSE, block_m) is (32 <= block_m <= most)
    for found in SM90_DENSE.candidates(CallKind(Path.BF16, Target.SM90, M3), block_m, block_m / 1.1):
        assert 128 * found.num_stages * (found.block_n + block_m) <= 224 * 1024
