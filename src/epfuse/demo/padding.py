"""How many rows a rank lays out for a routing, in local blocks and in globally aligned 64-row tiles."""

from __future__ import annotations

import torch

from epfuse.arguments import checks_enums
from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.policy import CallKind, decide
from epfuse.stages.route.reference import local_experts, route
from epfuse.target import Target, device_name, target_of

GLOBAL_TILE = 64


@checks_enums
def planned_block_m(
    device: torch.device, shape: LayerShape, tokens: int, weights: WeightFormat = WeightFormat.DENSE
) -> int:
    """BLOCK_M of a call; on a CPU, which has no tiles, that of gfx942."""
    target = target_of(device)
    where, product = (target, device_name(device)) if target.is_gpu else (Target.GFX942, None)
    tiles = decide(CallKind(Path.AUTO, where, shape, frozenset({weights}), device_name=product), tokens).tiles
    assert tiles is not None  # every GPU has kernels for dense weights and MXFP8
    return tiles.block_m


def local_rows(topk_ids: torch.Tensor, expert_map: ExpertMap, block_m: int) -> tuple[int, int]:
    """``(useful, padded)`` rows of one rank: its local routes, and the slots of the blocks that they fill.

    Args:
        topk_ids: ``[T, K]`` int32 or int64, global expert ids.
        expert_map: of the rank.
        block_m: rows of a block; each expert's routes begin a new one.
    """
    slots = expert_map.on(topk_ids.device)
    useful = int((local_experts(topk_ids, slots) >= 0).sum())
    if expert_map.num_local == 0:
        return useful, 0
    return useful, int(route(topk_ids, slots, expert_map.num_local, block_m).num_padded)


def globally_aligned_rows(topk_ids: torch.Tensor, experts: int) -> int:
    """Rows of one rank when all E experts' routes, the remote ones too, are aligned to `GLOBAL_TILE` rows.

    Args:
        topk_ids: ``[T, K]`` int32 or int64.
        experts: E.
    """
    return local_rows(topk_ids, ExpertMap.all_local(experts), GLOBAL_TILE)[1]
