"""Layers and routings that tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epfuse import Combine, ExpertMap, ExpertWeights, Path, Scratch, SwiGLUOAI
from epfuse.config import WeightFormat
from epfuse.families.registry import family_of
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import LayerTiles, RouteTiles
from epfuse.tuning.calls import layer_call


@dataclass(frozen=True)
class Case:
    """One call of one rank, on one device."""

    hidden: torch.Tensor
    weights: ExpertWeights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: ExpertMap


ROUTINGS = ("uniform", "one_expert", "nothing_local", "duplicates", "padding_ids", "single_local_route")


def topk_ids_for(kind: str, tokens: int, experts: int, local: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """``[T, K]`` int64 ids; the local experts of the cases are 0..local-1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(top_k, dim=1).indices
    if kind == "one_expert":
        ids[:, 0] = 1 % local
        ids[:, 1:] = local
    elif kind == "nothing_local":
        ids = local + ids % (experts - local)
    elif kind == "duplicates":
        ids[:, :2] = 0
    elif kind == "padding_ids":
        ids[1::2] = -1
        ids[0, 0] = experts + 5
        ids[0, 1 % top_k] = -7
    elif kind == "single_local_route":
        ids = local + ids % (experts - local)
        ids[-1, -1] = local - 1
    return ids


def make_case(
    device: torch.device,
    tokens: int = 37,
    hidden: int = 64,
    intermediate: int = 48,
    experts: int = 16,
    local: int = 4,
    top_k: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    routing: str = "uniform",
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random layer and routing; ``scale`` > 5 makes the clamp at 7.0 bite."""
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, hidden, generator=g) * scale
    w13 = torch.randn(local, 2 * intermediate, hidden, generator=g) / hidden**0.5
    w2 = torch.randn(local, hidden, intermediate, generator=g) / intermediate**0.5
    weights = torch.rand(tokens, top_k, generator=g)
    ids = topk_ids_for(routing, tokens, experts, local, top_k, seed)
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[:local] = torch.arange(local, dtype=torch.int32)
    return Case(
        x.to(device, dtype),
        ExpertWeights.dense(w13.to(device, dtype), w2.to(device, dtype)),
        weights.to(device),
        ids.to(device),
        ExpertMap(slots.to(device)),
    )


def snr_db(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to noise in dB against a float64 reference; -inf if out has a value that the reference has not."""
    if not torch.isfinite(out).all():
        return float("-inf")
    reference = reference.double()
    noise = (out.double() - reference).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(reference.norm() / noise))


def routed(
    ids: torch.Tensor,
    slots: torch.Tensor,
    local: int,
    block_m: int,
    tiles: RouteTiles | None = None,
    arrivals_per_block: int = 0,
) -> RouteTable:
    """The kernels' route table, in memory of its own."""
    from epfuse.stages.route.launch import launch_route

    table = RouteTable.empty(ids.numel(), local, block_m, ids.device, arrivals_per_block)
    return launch_route(ids, slots, local, table, tiles)


def moved(tensor: torch.Tensor, begin: int) -> torch.Tensor:
    """A copy whose memory begins so many bytes past a multiple of 16."""
    memory = torch.empty(tensor.nbytes + 32, dtype=torch.uint8, device=tensor.device)
    first = -memory.data_ptr() % 16 + begin
    return memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def packed_routes(table: RouteTable) -> torch.Tensor:
    """``[n]`` int64: the route of each packed row."""
    return torch.cat([found for _, found in table.groups()] or [table.sorted_routes[:0].long()])


def first_experts(experts: int, local: int, device: torch.device) -> torch.Tensor:
    """``[E]`` int32: an expert map whose first experts are the local ones."""
    slots = torch.full((experts,), -1, dtype=torch.int32, device=device)
    slots[:local] = torch.arange(local, dtype=torch.int32, device=device)
    return slots


def run_in_tiles(
    path: Path,
    form: WeightFormat,
    tiles: LayerTiles,
    case: Case,
    weights: ExpertWeights,
    combine: Combine = Combine.DETERMINISTIC,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
    activation: SwiGLUOAI | None = None,
) -> torch.Tensor:
    """A call's steps in tiles that the caller names, into ``out`` or memory full of NaN."""
    out = torch.full_like(case.hidden, torch.nan) if out is None else out
    operands = (case.hidden, case.topk_weights, case.topk_ids, case.expert_map, activation or SwiGLUOAI())
    call = layer_call(form, weights, *operands)._replace(out=out, combine=combine, scratch=scratch)
    for _, launch in family_of(path, form, tiles).steps(call, tiles).launches:
        launch()
    return out
