"""Cut full expert weights into what one rank holds."""

from __future__ import annotations

import torch
from torch import nn

from epfuse.errors import LayoutError, ShapeError
from epfuse.expert_map import ExpertMap


def held_experts(expert_map: ExpertMap) -> list[int]:
    """Global ids of the experts that a rank holds, by local slot: ``[L]``, the inverse of the map."""
    slots = expert_map.on(torch.device("cpu"))
    order = torch.full((expert_map.num_local,), -1, dtype=torch.int64, device="cpu")
    held = (slots >= 0).nonzero().squeeze(1)
    order[slots[held].long()] = held
    return order.tolist()


def check_whole(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose memory is not plainly its numbers, and all of them.

    Args:
        name: what the error calls it.
        tensor: a tensor or parameter.

    Raises:
        LayoutError: a DTensor (a model under tensor parallelism or FSDP), a quantised subclass, or a sparse one.
    """
    kind = type(tensor)
    if kind not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise LayoutError(
            f"{name} is a {kind.__name__}, which another library splits over ranks or packs; epfuse needs plain tensors"
            " with every expert: load the model without a tensor-parallel plan, sharding or quantisation"
        )
    if tensor.layout != torch.strided:
        raise LayoutError(f"{name} has layout {tensor.layout}; it must be dense (call .to_dense() at load)")


def shard_experts(full: torch.Tensor, expert_map: ExpertMap) -> torch.Tensor:
    """This rank's rows of an all-experts tensor.

    Args:
        full: ``[E, ...]``, any dtype and device (a meta tensor gives a meta tensor).
        expert_map: which experts the rank holds.

    Returns:
        ``[L, ...]`` contiguous; a copy, so that ``full`` can be freed. Row ``l`` is the expert in slot ``l``.

    Raises:
        ShapeError: ``full`` does not have E rows.
        LayoutError: ``full`` is no plain tensor, see `check_whole`.
    """
    check_whole("full", full)
    if full.dim() == 0 or full.shape[0] != expert_map.num_experts:
        raise ShapeError(
            f"full has shape {tuple(full.shape)}; the expert map needs [E, ...] with E={expert_map.num_experts}"
        )
    index = torch.tensor(held_experts(expert_map), dtype=torch.int64, device=full.device)
    return full.index_select(0, index)
