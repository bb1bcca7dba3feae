"""A layer's experts from where a checkpoint has them to where `ExpertWeights` wants them, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from epfuse.numerics.e8m0 import as_e8m0_bytes, decode_scales
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.block_fp8 import BLOCK, BlockFP8, BlockFP8Experts
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.dense import DenseExperts
from epfuse.weights.expert_tensors import LayerTensors, Matrix, Part, matrix_size, needed_matrices
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.layouts import GateUpRows, MatrixOrder
from epfuse.weights.model_config import ExpertModel
from epfuse.weights.mxfp4 import to_mxfp8
from epfuse.weights.mxfp8 import MXFP8Experts
from epfuse.weights.projections import AnyProjections

PROJECTIONS = (Matrix.GATE_UP, Matrix.DOWN)
"""A layer's w13 and w2, whatever tensors they are stored in; w13 has no gate rows where there is no gate."""
TRANSLATIONS = 16
"""Parts in which a matrix of MXFP4 is translated. A part takes three times what is made of it meanwhile, so loading
takes half an expert's MXFP8 beyond the result: the matrix as it is stored, and a part."""


@dataclass(frozen=True)
class LayerReader:
    """Reads one layer for one rank.

    Args:
        model: the sizes.
        layer: where its experts are, checked.
        held: global ids of the experts, by local slot.
        device: where the weights go.
        on_bytes: told how many bytes were read.
    """

    model: ExpertModel
    layer: LayerTensors
    held: Sequence[int]
    device: torch.device
    on_bytes: Callable[[int], None]

    def weights(self) -> ExpertWeights:
        """All of it.

        Raises:
            CheckpointError: a file can't be read, or was changed meanwhile.
        """
        biases = [self._bias(matrix) for matrix in PROJECTIONS] if self.model.has_bias else []
        return ExpertWeights((self._experts(),), *biases)

    def _experts(self) -> AnyProjections:
        form = self.layer.form
        if form is Checkpoint.BF16:
            return DenseExperts(*(self._weights(matrix, self._dtype) for matrix in PROJECTIONS))
        if form is Checkpoint.BLOCK_FP8:
            return BlockFP8Experts(*map(self._block_fp8, PROJECTIONS))
        return MXFP8Experts(*map(self._from_mxfp4 if form is Checkpoint.MXFP4 else self._mxfp8, PROJECTIONS))

    @property
    def _dtype(self) -> torch.dtype:
        return next(tensor.dtype for (_, _, part), tensor in self.layer.tensors.items() if part is Part.WEIGHT)

    def _block_fp8(self, matrix: Matrix) -> BlockFP8:
        return BlockFP8(self._weights(matrix, torch.float8_e4m3fn), self._scales(matrix, BLOCK, BLOCK, torch.float32))

    def _mxfp8(self, matrix: Matrix) -> MXFP8:
        return MXFP8(self._weights(matrix, torch.float8_e4m3fn), self._scales(matrix, 1, GROUP, torch.uint8))

    def _from_mxfp4(self, matrix: Matrix) -> MXFP8:
        rows, columns = matrix_size(self.model, matrix)
        values = self._empty((rows, columns), torch.float8_e4m3fn)
        scales = self._empty((rows, columns // GROUP), torch.uint8)
        for slot, expert in enumerate(self.held):
            pieces = self._pieces(matrix)
            halves = (values[slot].chunk(len(pieces)), scales[slot].chunk(len(pieces)))
            for piece, own_values, own_scales in zip(pieces, *halves, strict=True):
                blocks, bytes_ = (self._raw(expert, piece, part) for part in (Part.WEIGHT, Part.SCALE))
                self._place(own_scales, as_e8m0_bytes("scales", bytes_), piece, Part.SCALE)
                self._translate(own_values, blocks, bytes_, piece)
        return MXFP8(values, scales)

    def _translate(self, target: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, matrix: Matrix) -> None:
        """MXFP4 of one matrix to E4M3 where it is to be, some rows at a time: what is made of them is a copy."""
        apart = target.chunk(2) if self._alternates(matrix) else (target,)
        rows = -(-blocks.shape[0] // (TRANSLATIONS * len(apart)))
        parts = (torch.split(each, rows * len(apart)) for each in (blocks, scales))
        for place, codes in enumerate(to_mxfp8(*part).values for part in zip(*parts, strict=True)):
            for first, half in enumerate(apart):
                half[place * rows :][:rows].copy_(codes[first :: len(apart)])

    def _weights(self, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return self._stack(matrix, Part.WEIGHT, self._empty(matrix_size(self.model, matrix), dtype))

    def _scales(self, matrix: Matrix, high: int, wide: int, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = matrix_size(self.model, matrix)
        return self._stack(matrix, Part.SCALE, self._empty((-(-rows // high), -(-columns // wide)), dtype))

    def _bias(self, matrix: Matrix) -> torch.Tensor:
        rows, _ = matrix_size(self.model, matrix)
        return self._stack(matrix, Part.BIAS, self._empty((rows,), torch.float32))

    def _empty(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((len(self.held), *size), dtype=dtype, device=self.device)

    def _stack(self, matrix: Matrix, part: Part, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` ``[L, ..]`` with one part of a projection, expert by expert."""
        for slot, expert in enumerate(self.held):
            pieces = self._pieces(matrix)
            for piece, target in zip(pieces, out[slot].chunk(len(pieces)), strict=True):
                self._fill(target, expert, piece, part)
        return out

    def _pieces(self, matrix: Matrix) -> tuple[Matrix, ...]:
        """The matrices that a projection is stored in, in the order of its rows."""
        gate_up = needed_matrices(self.model, self.layer.naming)[:-1]
        return (matrix,) if matrix is Matrix.DOWN else gate_up

    def _fill(self, target: torch.Tensor, expert: int, matrix: Matrix, part: Part) -> None:
        tensor, row = self.layer.at(expert, matrix, part)
        same_bits = tensor.dtype == target.dtype or target.dtype == torch.uint8
        if same_bits and target.device.type == "cpu" and not self._is_rearranged(matrix, part):
            tensor.read_into(target, row)  # where it is to be: no copy
            self.on_bytes(target.nbytes)
            return
        self._place(target, _as(self._raw(expert, matrix, part), target.dtype), matrix, part)

    def _raw(self, expert: int, matrix: Matrix, part: Part) -> torch.Tensor:
        """One expert's part as it is stored."""
        tensor, row = self.layer.at(expert, matrix, part)
        raw = torch.empty(tensor.shape[row is not None :], dtype=tensor.dtype, device="cpu")
        tensor.read_into(raw, row)
        self.on_bytes(raw.nbytes)
        return raw

    def _is_rearranged(self, matrix: Matrix, part: Part) -> bool:
        return self._is_transposed(part) or self._alternates(matrix)

    def _is_transposed(self, part: Part) -> bool:
        return part is Part.WEIGHT and self.layer.layout.matrices is MatrixOrder.COLUMNS

    def _alternates(self, matrix: Matrix) -> bool:
        return self.layer.layout.gate_up is GateUpRows.ALTERNATING and matrix is Matrix.GATE_UP

    def _place(self, target: torch.Tensor, raw: torch.Tensor, matrix: Matrix, part: Part) -> None:
        """Copy a part of a matrix, as it is stored, to where gate rows come first and rows are rows."""
        straight = raw.mT if self._is_transposed(part) else raw
        if self._alternates(matrix):
            gate, up = target.chunk(2)
            gate.copy_(straight[0::2])
            up.copy_(straight[1::2])
        else:
            target.copy_(straight)


def _as(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale bytes as bytes, float scales and biases as float32, anything else as it is: no number changes."""
    if raw.dtype == torch.float8_e8m0fnu:
        return decode_scales(raw.view(torch.uint8), dtype) if dtype == torch.float32 else raw.view(torch.uint8)
    return raw.to(dtype)
