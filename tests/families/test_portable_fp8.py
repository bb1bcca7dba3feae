"""The layer with FP8 activations against the float64 oracle, in poisoned memory."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, Target
from epfuse.config import Combine, SwiGLUOAI, WeightFormat
from epfuse.reference import run_reference
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.verify.suite import poisoned_memory, same_bits
from epfuse.weights.block_fp8 import BlockScale
from tests.cases import ROUTINGS, Case, make_case, run_in_tiles, snr_db

TILE = GemmTile(block_n=128, block_k=128, group_m=0, num_warps=4, num_stages=2)
TILES = LayerTiles(16, TILE, TILE)
# The noise of two quantised activations (epfuse.verify.budget), for calls of few and short rows. Measured on a CPU:
# 25.2 to 27.3 dB.
FLOOR = 24.0


def prepared(case: Case, form: WeightFormat) -> ExpertWeights:
    """The case's weights in ``form``, by way of MXFP8 as a checkpoint would have it."""
    weights = ExpertWeights.quantize(case.weights)
    if form in (WeightFormat.BLOCK_FP8, WeightFormat.BLOCK_FP8_FNUZ):
        w13, w2 = weights.mxfp8_experts.w13, weights.mxfp8_experts.w2
        weights = ExpertWeights.block_fp8(w13.values, w13.scales, w2.values, w2.scales)
    target = Target.GFX942 if form in (WeightFormat.MXFP8_FNUZ, WeightFormat.BLOCK_FP8_FNUZ) else Target.GFX950
    weights = weights.prepare(target)
    assert list(weights.kept) == [form]
    return weights


FORMS = [
    WeightFormat.MXFP8,
    WeightFormat.MXFP8_FNUZ,
    WeightFormat.BLOCK_FP8,
    WeightFormat.BLOCK_FP8_FNUZ,
]


@pytest.fixture(params=FORMS, ids=[form.value for form in FORMS])
def form(request: pytest.FixtureRequest, device: torch.device) -> WeightFormat:
    fnuz = request.param in (WeightFormat.MXFP8_FNUZ, WeightFormat.BLOCK_FP8_FNUZ)
    if device.type == "cuda" and fnuz != (torch.version.hip is not None):
        pytest.skip("not this GPU's E4M3")
    return request.param


def run(
    case: Case, weights: ExpertWeights, combine: Combine = Combine.DETERMINISTIC, tiles: LayerTiles = TILES
) -> torch.Tensor:
    form = next(iter(weights.kept))
    path = Path.BLOCK_FP8 if form in FORMS[2:] else Path.W8A8
    with poisoned_memory():
        return run_in_tiles(path, form, tiles, case, weights, combine)


def oracle(case: Case, weights: ExpertWeights) -> torch.Tensor:
    call = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map, SwiGLUOAI())
    return run_reference(*call, compute=torch.float64)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_against_the_oracle(device: torch.device, routing: str, form: WeightFormat) -> None:
    case = make_case(device, tokens=9, hidden=160, intermediate=96, routing=routing, scale=4.0)
    weights = prepared(case, form)
    want = oracle(case, weights)
    empty = want.abs().sum(1) == 0
    for combine in Combine:
        out = run(case, weights, combine)
        assert not out[empty].any()
        assert empty.all() or snr_db(out, want) > FLOOR


def test_atomics_round_once_less(device: torch.device, form: WeightFormat) -> None:
    case = make_case(device, tokens=11, hidden=160, intermediate=96, experts=4, local=4)
    weights = prepared(case, form)
    want = oracle(case, weights)
    fixed, atomic = run(case, weights), run(case, weights, Combine.ATOMIC)
    assert snr_db(atomic, fixed) > 45  # both round the same sums to BF16, the fixed order twice
    assert snr_db(atomic, want) > snr_db(fixed, want) - 3.5  # 1.5 times the error


def test_two_runs_have_the_same_bits(device: torch.device, form: WeightFormat) -> None:
    case = make_case(device, tokens=13, hidden=96, intermediate=64)
    weights = prepared(case, form)
    assert same_bits(run(case, weights), run(case, weights))


def test_fnuz_and_fn_give_the_same_bits(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU multiplies one of the two")
    case = make_case(device, tokens=13, hidden=160, intermediate=96, scale=4.0)
    for fn, fnuz in (FORMS[:2], FORMS[2:]):
        assert same_bits(run(case, prepared(case, fn)), run(case, prepared(case, fnuz)))


def test_sum_over_ranks_is_the_unsharded_layer(device: torch.device) -> None:
    """Quantisation does not depend on the sharding: only the roundings of the rows' sums do."""
    case = make_case(device, tokens=13, hidden=96, intermediate=64, experts=8, local=8)
    form = WeightFormat.MXFP8_FNUZ if torch.version.hip else WeightFormat.MXFP8
    whole = prepared(case, form).kept[form]
    total = torch.zeros(case.hidden.shape, dtype=torch.float64, device=device)
    for rank in range(4):
        held = slice(2 * rank, 2 * rank + 2)
        parts = [t[held].contiguous() for w in (whole.w13, whole.w2) for t in (w.values, w.scales)]
        shard = Case(
            case.hidden,
            ExpertWeights.mxfp8(*parts),
            case.topk_weights,
            case.topk_ids,
            ExpertMap.contiguous(8, 4, rank, device),
        )
        total += run(shard, shard.weights)
    assert snr_db(total, run(case, prepared(case, form))) > 45


def test_a_nan_router_weight_reaches_only_its_token(device: torch.device, form: WeightFormat) -> None:
    case = make_case(device, tokens=5, hidden=96, intermediate=64, experts=4, local=4)
    case.topk_weights[2, 1] = torch.nan
    for combine in Combine:
        out = run(case, prepared(case, form), combine)
        assert torch.equal(out.isnan().all(1), torch.arange(5, device=device) == 2)
        assert torch.equal(out.isnan().any(1), torch.arange(5, device=device) == 2)


@pytest.mark.parametrize("rule", list(BlockScale))
def test_error_of_block_fp8_against_the_mxfp8_oracle(device: torch.device, rule: BlockScale) -> None:
    case = make_case(device, tokens=11, hidden=256, intermediate=256, experts=4, local=4)
    packed = ExpertWeights.quantize(case.weights)
    w13, w2 = packed.mxfp8_experts.w13, packed.mxfp8_experts.w2
    weights = ExpertWeights.block_fp8(w13.values, w13.scales, w2.values, w2.scales, scale=rule)
    if torch.version.hip:
        weights = weights.prepare(Target.GFX942)
    against_mxfp8 = snr_db(run(case, weights), oracle(case, packed))
    print(f"{rule.value}: {against_mxfp8:.1f} dB against MXFP8 weights")
    assert against_mxfp8 > FLOOR - (0 if rule is BlockScale.POWER_OF_TWO else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("combine", list(Combine))
@pytest.mark.parametrize("tokens", [1, 37, 300, 2048])
def test_larger_layers(device: torch.device, tokens: int, form: WeightFormat, combine: Combine) -> None:
    from epfuse.families.portable_fp8 import FP8_TILES
    from epfuse.target import target_of

    case = make_case(device, tokens=tokens, hidden=2048, intermediate=1024, experts=32, local=8)
    weights = prepared(case, form)
    tiles = next(entry.tiles for entry in FP8_TILES[target_of(device)] if tokens * 4 / 32 <= entry.max_rows)
    assert snr_db(run(case, weights, combine, tiles), oracle(case, weights)) > FLOOR
