"""No kernel of a layer writes outside of its tensors, and nothing around them changes a result."""

from __future__ import annotations

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, fused_experts
from epfuse.config import Combine, Path, SwiGLUOAI, WeightFormat
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.verify.suite import same_bits
from tests.cases import ROUTINGS, Case, make_case, run_in_tiles
from tests.stages.guarded import Guards

TILE = GemmTile(block_n=64, block_k=128, group_m=2, num_warps=4, num_stages=2)
TILES = LayerTiles(16, TILE, TILE)
CASES = {
    "bf16": (torch.bfloat16, WeightFormat.DENSE),
    "fp16": (torch.float16, WeightFormat.DENSE),
    "mxfp8": (torch.bfloat16, WeightFormat.MXFP8),
    "w8a8": (torch.bfloat16, WeightFormat.MXFP8),
    "w8a8 atomic": (torch.bfloat16, WeightFormat.MXFP8),
    "block_fp8": (torch.bfloat16, WeightFormat.BLOCK_FP8),
}


PATHS = {"mxfp8": Path.W8A16, "w8a8": Path.W8A8, "w8a8 atomic": Path.W8A8, "block_fp8": Path.BLOCK_FP8}


def portable(name: str, call: tuple, out: torch.Tensor) -> torch.Tensor:
    hidden, weights, topk_weights, topk_ids, expert_map, _ = call
    case = Case(hidden, weights, topk_weights, topk_ids, expert_map)
    combine = Combine.ATOMIC if "atomic" in name else Combine.DETERMINISTIC
    return run_in_tiles(PATHS.get(name, Path.BF16), CASES[name][1], TILES, case, weights, combine, out)


def stored(case: Case, form: WeightFormat) -> ExpertWeights:
    if form is WeightFormat.DENSE:
        return case.weights
    weights = ExpertWeights.quantize(case.weights)
    if form is WeightFormat.BLOCK_FP8:
        w13, w2 = weights.mxfp8_experts.w13, weights.mxfp8_experts.w2
        weights = ExpertWeights.block_fp8(w13.values, w13.scales, w2.values, w2.scales)
    return weights


def check(case: Case, weights: ExpertWeights, run, least: int) -> None:
    """``run(call, out)`` twice, in other surroundings: the same bits, and the zones untouched."""
    results = []
    for fill in (0xFF, 0x5A):
        with Guards(fill) as guards:
            inputs = [guards.copy(t) for t in (case.hidden, weights, case.topk_weights, case.topk_ids)]
            slots = guards.copy(case.expert_map.on(case.hidden.device))
            call = (*inputs, ExpertMap(slots), SwiGLUOAI())
            results.append(run(call, torch.empty_like(case.hidden)).clone())
        assert guards.check() >= least
    assert same_bits(*results)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tokens", "routing"), [(1, "single_local_route"), (1, "nothing_local"), (3, "padding_ids")])
def test_portable_kernels(device: torch.device, tokens: int, routing: str, name: str) -> None:
    if torch.version.hip is not None and "8" in name:
        pytest.skip("E4M3 of another GPU")
    dtype, form = CASES[name]
    sizes = (33, 17) if form is WeightFormat.DENSE else (64, 96)
    case = make_case(device, tokens, *sizes, experts=6, local=3, top_k=3, dtype=dtype, routing=routing)
    check(case, stored(case, form), lambda call, out: portable(name, call, out), least=10)


@pytest.mark.gpu
@pytest.mark.parametrize("path", [Path.BF16, Path.W8A16, Path.W8A8])
@pytest.mark.parametrize("tokens", [1, 3, 13, 40, 130, 600])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (160, 96), (384, 256)])
def test_every_tile_of_a_gpu(device: torch.device, hidden: int, intermediate: int, tokens: int, path: Path) -> None:
    """What the policy takes at so many rows an expert, in layers that are smaller than its tiles."""
    for routing in ROUTINGS:
        case = make_case(device, tokens, hidden, intermediate, experts=6, local=3, top_k=3, routing=routing)
        weights = case.weights
        if path is not Path.BF16:
            weights = ExpertWeights.quantize(case.weights).prepare(path=path)
        check(
            case,
            weights,
            lambda call, out: fused_experts(*call[:-1], activation=call[-1], path=path, out=out),
            least=10,
        )
