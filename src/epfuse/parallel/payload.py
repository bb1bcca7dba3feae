"""A token's row on its way to another rank, as bytes: its expert ids, its router weights and its activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from epfuse.arguments import checks_enums, integer
from epfuse.config import Path, WeightFormat
from epfuse.numerics.mxfp8 import BLOCK
from epfuse.stages.grid import pieces
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.weights.block_fp8 import BLOCK as BLOCK_FP8_GROUP
from epfuse.weights.experts import ExpertWeights

META = 8
"""Bytes of a route: an int32 id and a float32 weight."""


class Payload(ABC):
    """How activations travel."""

    @abstractmethod
    def nbytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of one token's H values."""

    @abstractmethod
    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` bf16, fp16 or fp32, contiguous, as ``[T, nbytes]`` uint8, which may be a view."""

    @abstractmethod
    def decode(self, data: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """``[N, nbytes]`` uint8 as ``[N, H]`` of ``dtype``, contiguous."""


@dataclass(frozen=True)
class AsGiven(Payload):
    """The activations' own bits."""

    def nbytes(self, hidden: int, dtype: torch.dtype) -> int:
        return hidden * dtype.itemsize

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view(torch.uint8)

    def decode(self, data: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        return compact(data).view(dtype)


AS_GIVEN = AsGiven()


@dataclass(frozen=True)
class FP8(Payload):
    """E4M3 values and an E8M0 scale for each group of them, rounded as the paths with FP8 activations round.

    Half of BF16's bytes. A path that quantises its rows in the same groups loses nothing by it: the numbers that arrive
    are the ones that it would have made itself, and it makes them again, whatever rows they are among.

    Args:
        group: values that share a scale, as `of` finds it.

    Raises:
        ConfigError: group is no positive integer.
    """

    group: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", integer("group", self.group, least=1))

    def nbytes(self, hidden: int, dtype: torch.dtype) -> int:
        return hidden + pieces(hidden, self.group)

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self._quantize(hidden)
        return torch.cat([rows.values.view(torch.uint8), rows.scales], dim=1)

    def decode(self, data: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        values = compact(data[:, :hidden]).view(torch.float8_e4m3fn)
        return FP8Rows(values, compact(data[:, hidden:]), self.group).dequantize(torch.float32).to(dtype)

    def _quantize(self, hidden: torch.Tensor) -> FP8Rows:
        if hidden.is_cuda and self.group in (BLOCK, BLOCK_FP8_GROUP) and hidden.shape[1] % BLOCK == 0:
            from epfuse.stages.quantize.launch import launch_quantize

            return launch_quantize(hidden, self.group)
        return quantize(hidden, self.group)


@checks_enums
def payload_for(path: Path, weights: ExpertWeights) -> Payload:
    """The smallest payload that costs ``path`` nothing: FP8 in its own groups where it quantises anyway.

    Args:
        path: the one that runs, not AUTO.
        weights: as it reads them: W8A8 has groups of 32 beside MXFP8 and one scale a row beside prepared weights.
    """
    if path is Path.BLOCK_FP8:
        return FP8(BLOCK_FP8_GROUP)
    if path is Path.W8A8:
        return FP8(weights.hidden if WeightFormat.ROW_FP8 in weights.kept else BLOCK)
    return AsGiven()


@dataclass(frozen=True)
class Rows:
    """Tokens of one call.

    Attributes:
        hidden: ``[N, H]``.
        topk_weights: ``[N, K]`` float32.
        topk_ids: ``[N, K]`` int32; -1 where there is no route.
    """

    hidden: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def pack(hidden: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, payload: Payload) -> torch.Tensor:
    """A row of bytes for each token: ids and weights, route by route, then the activations.

    Args:
        hidden: ``[T, H]`` bf16, fp16 or fp32, contiguous.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32 or int64. An id that is no int32 becomes -1 and does not wrap.
        payload: how the activations travel.

    Returns:
        ``[T, 8 K + nbytes]`` uint8, new memory.
    """
    wide = topk_ids.long()  # beside int32, torch wraps the bound
    ids = torch.where((wide >= 0) & (wide < 2**31), wide, -1).int()
    meta = torch.stack([ids, topk_weights.view(torch.int32)], dim=2).flatten(1)
    return torch.cat([meta.view(torch.uint8), payload.encode(hidden)], dim=1)


def unpack(data: torch.Tensor, top_k: int, hidden: int, dtype: torch.dtype, payload: Payload) -> Rows:
    """What `pack` packed.

    Args:
        data: ``[N, 8 K + nbytes]`` uint8.
        top_k: K.
        hidden: H.
        dtype: of the activations.
        payload: as it was packed.
    """
    meta = compact(data[:, : META * top_k]).view(torch.int32).view(-1, top_k, 2)
    weights = meta[..., 1].contiguous().view(torch.float32)
    return Rows(payload.decode(data[:, META * top_k :], hidden, dtype), weights, meta[..., 0].contiguous())


def compact(data: torch.Tensor) -> torch.Tensor:
    """A copy of any shape and dtype whose strides a view as wider numbers takes.

    contiguous() would not copy a slice of no row or of one row, whatever its strides.
    """
    return data.clone(memory_format=torch.contiguous_format)


def blank(rows: int, top_k: int, hidden: int, like: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Packed rows without a route; their activations are zero, so that nothing in them can trap.

    Args:
        rows: N.
        top_k: K.
        hidden: H.
        like: a tensor with the activations' dtype and device.
        payload: how they travel.

    Returns:
        ``[N, 8 K + nbytes]`` uint8.
    """
    ids = torch.full((rows, top_k), -1, dtype=torch.int32, device=like.device)
    weights = torch.zeros(rows, top_k, device=like.device)
    return pack(like.new_zeros(rows, hidden), weights, ids, payload)
