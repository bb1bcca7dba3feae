"""Matrix instructions: where each lane's elements lie in the matrices, and what is computed.

With M rows (16 or 32), a lane holds row ``lane % M`` of A and column ``lane % M`` of B, and of K the part
``lane // M``, its elements one after the other in the lane's registers. Of D it holds column ``lane % M``; register
``r`` is row ``8 * (r // 4) + 4 * (lane // 32) + r % 4`` for M = 32 and ``4 * (lane // 16) + r`` for M = 16.

All products of a row are summed in double precision with C, then rounded once. The hardware's order of additions, and
what it rounds in between, is not public: sums that are exact in any order have the same bits there, others may differ
in the last ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.floats import FP8
from epfuse.aot.isa.operands import bits_of, expect, mask_of, register, unknown
from epfuse.aot.isa.program import Constant, Instruction, Operand
from epfuse.aot.isa.registers import VECTORS, Register
from epfuse.aot.isa.wave import FULL, Row, Step, Wave

Matrix = NDArray[np.float64]


def _bf16(raw: Row) -> Matrix:
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _f16(raw: Row) -> Matrix:
    return raw.view(np.float16).astype(np.float64)


def _f32(raw: Row) -> Matrix:
    return raw.view(np.float32).astype(np.float64)


def _fp8(raw: Row) -> Matrix:
    return FP8[raw.view(np.uint8)].astype(np.float64)


@dataclass(frozen=True)
class Shape:
    """A matrix instruction.

    Attributes:
        rows: of A and D, and columns of B and D.
        depth: K.
        registers: of A, and of B, in a lane.
        read: from a lane's registers, [64, registers], to its elements, [64, elements].
        passes: of four clocks.
        xdl: whether the matrix core computes it that is not the one of FP32 and FP64.
    """

    rows: int
    depth: int
    registers: int
    read: Callable[[Row], Matrix]
    passes: int
    xdl: bool = True

    @property
    def results(self) -> int:
        """Registers of C and D in a lane."""
        return self.rows * self.rows // 64


SHAPES = {
    "v_mfma_f32_16x16x16_bf16": Shape(16, 16, 2, _bf16, 4),
    "v_mfma_f32_32x32x8_bf16": Shape(32, 8, 2, _bf16, 8),
    "v_mfma_f32_16x16x16_f16": Shape(16, 16, 2, _f16, 4),
    "v_mfma_f32_32x32x8_f16": Shape(32, 8, 2, _f16, 8),
    "v_mfma_f32_16x16x4_f32": Shape(16, 4, 1, _f32, 8, xdl=False),
    "v_mfma_f32_32x32x2_f32": Shape(32, 2, 1, _f32, 16, xdl=False),
    "v_mfma_f32_16x16x32_fp8_fp8": Shape(16, 32, 2, _fp8, 4),
    "v_mfma_f32_32x32x16_fp8_fp8": Shape(32, 16, 2, _fp8, 8),
}


def rows_by_depth(lanes: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """From [64, elements] of the lanes to [rows, depth]."""
    blocks = 64 // shape.rows
    return lanes.reshape(blocks, shape.rows, -1).transpose(1, 0, 2).reshape(shape.rows, -1)


def to_registers(matrix: NDArray[Any], rows: int) -> NDArray[Any]:
    """From D, [rows, rows], to [registers, 64]."""
    if rows == 16:
        return matrix.reshape(4, 4, 16).transpose(1, 0, 2).reshape(4, 64)
    return matrix.reshape(4, 2, 4, 32).transpose(0, 2, 1, 3).reshape(16, 64)


def from_registers(registers: NDArray[Any], rows: int) -> NDArray[Any]:
    """From [registers, 64] to C, [rows, rows]."""
    if rows == 16:
        return registers.reshape(4, 4, 16).transpose(1, 0, 2).reshape(16, 16)
    return registers.reshape(4, 4, 2, 32).transpose(0, 2, 1, 3).reshape(32, 32)


def decode(name: str, instruction: Instruction) -> Step | None:
    """A step of a matrix instruction; None if ``name`` is none."""
    if not name.startswith("v_mfma"):
        return None
    if name not in SHAPES:
        raise unknown(instruction, "the matrix instruction is not known")
    shape = SHAPES[name]
    expect(instruction, 4)
    target, left, right, add = instruction.operands
    d = register(target, instruction, scalar=False, count=shape.results).row
    a, b = (register(each, instruction, scalar=False, count=shape.registers).row for each in (left, right))
    added = _addend(add, shape, instruction)
    size, results, rows, read = shape.registers, shape.results, shape.rows, shape.read

    def run(wave: Wave) -> None:
        left = rows_by_depth(read(wave.file[a : a + size].T.copy()), shape)
        right = rows_by_depth(read(wave.file[b : b + size].T.copy()), shape)
        total = left @ right.T
        if isinstance(added, int):
            total += from_registers(wave.file[added : added + results].view(np.float32), rows)
        else:
            total += added
        wave.file[d : d + results] = to_registers(total.astype(np.float32), rows).view(np.uint32)

    def shade(wave: Wave) -> None:
        sides: Any = [
            np.any(rows_by_depth(wave.shadow_file[first : first + size].T.copy(), shape), axis=1) for first in (a, b)
        ]
        found = sides[0][:, None] | sides[1][None, :]
        if isinstance(added, int):
            found = found | (from_registers(wave.shadow_file[added : added + results], rows) != 0)
        everyone = np.ones(64, np.bool_)
        for place, shadow in enumerate(to_registers(np.where(found, FULL, np.uint32(0)), rows)):
            wave.shade(d + place, shadow, everyone)

    facts = {"passes": shape.passes, "xdl": int(shape.xdl), "ab": mask_of(left, right), "c": mask_of(add)}
    writes = ((1 << results) - 1) << (d + VECTORS)
    return Step(instruction, name, "mfma", run, mask_of(left, right, add), writes, shade, near=True, facts=facts)


def _addend(operand: Operand, shape: Shape, instruction: Instruction) -> int | np.float64:
    """The first row of C, or the constant that all of C is."""
    if isinstance(operand, Constant):
        return np.float64(np.uint32(bits_of(operand, 32, instruction)).view(np.float32))
    if not isinstance(operand, Register):
        raise unknown(instruction, "C must be registers or a constant")
    return register(operand, instruction, scalar=False, count=shape.results).row
