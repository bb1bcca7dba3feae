"""From operands to functions that read them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from epfuse.aot.isa.errors import UnknownInstruction
from epfuse.aot.isa.program import Constant, Instruction, Operand
from epfuse.aot.isa.registers import Register
from epfuse.aot.isa.wave import Wave

Value = Any
"""Bits or numbers: one a lane, or one for all lanes."""
Source = Callable[[Wave], Value]
SIGN, REST = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
SELECTIONS = {f"BYTE_{place}": (8 * place, 8) for place in range(4)} | {"WORD_0": (0, 16), "WORD_1": (16, 16)}


def unknown(instruction: Instruction, why: str) -> UnknownInstruction:
    """An error that shows the line."""
    return UnknownInstruction(f"{why}: {instruction.text}", instruction.line)


def expect(instruction: Instruction, operands: int, *modifiers: str) -> None:
    """Refuse another number of operands, or modifiers that are not listed."""
    if len(instruction.operands) != operands:
        raise unknown(instruction, f"{len(instruction.operands)} operands where {operands} are known")
    for name in instruction.modifiers:
        if name not in modifiers:
            raise unknown(instruction, f"the modifier {name} is not known here")


def mask_of(*operands: Operand) -> int:
    """The registers among operands, as a set."""
    found = 0
    for operand in operands:
        if isinstance(operand, Register):
            found |= operand.mask
    return found


def bits_of(constant: Constant, bits: int, instruction: Instruction) -> int:
    """What a constant is in a register of 32 or 64 bits."""
    if isinstance(constant.value, float):
        if bits != 32:
            raise unknown(instruction, "a float constant of 64 bits is not known")
        return int(struct.unpack("<I", struct.pack("<f", constant.value))[0])
    if not -(1 << (bits - 1)) <= constant.value < 1 << bits:
        raise unknown(instruction, f"{constant.value} does not fit {bits} bits")
    return constant.value & ((1 << bits) - 1)


def register(
    operand: Operand, instruction: Instruction, *, scalar: bool | None = None, count: int = 1, modified: bool = False
) -> Register:
    """An operand that must be a register: scalar, vector or (None) either, so many, with modifiers or without."""
    if not isinstance(operand, Register):
        raise unknown(instruction, "an operand is no register")
    if scalar is not None and operand.is_scalar is not scalar:
        raise unknown(instruction, f"{operand} must be a {'scalar' if scalar else 'vector'} register")
    if operand.count != count:
        raise unknown(instruction, f"{operand} must be {count} registers")
    if not modified and (operand.negate or operand.absolute or operand.extend):
        raise unknown(instruction, f"{operand} must have no modifier")
    return operand


def scalar_source(operand: Operand, instruction: Instruction, bits: int = 32) -> Callable[[Wave], int]:
    """Read a scalar operand as an unsigned number."""
    if isinstance(operand, Constant):
        value = bits_of(operand, bits, instruction)
        return lambda wave: value
    first = register(operand, instruction, scalar=True, count=bits // 32).first
    if bits == 64:
        return lambda wave: wave.scalars[first] | wave.scalars[first + 1] << 32
    return lambda wave: wave.scalars[first]


def vector_source(
    operand: Operand, instruction: Instruction, *, floating: bool = False, half: int = 0, select: str = "DWORD"
) -> Source:
    """Read 32 bits a lane of a vector, scalar or constant operand.

    Args:
        operand: what to read.
        instruction: for messages.
        floating: whether sign modifiers are meant.
        half: of a pair of registers the second one if 1.
        select: SDWA's part of the register.
    """
    if isinstance(operand, Constant):
        value = np.uint32(bits_of(operand, 32, instruction))
        if half or select != "DWORD":
            raise unknown(instruction, "a part of a constant is not known")
        return lambda wave: value
    if not isinstance(operand, Register):
        raise unknown(instruction, "an operand is neither a register nor a constant")
    if (operand.negate or operand.absolute) and not floating:
        raise unknown(instruction, f"{operand} has a sign modifier where there is no float")
    source = _selected(_plain(operand, half), select, operand.extend, instruction)
    if operand.absolute and operand.negate:
        return lambda wave: source(wave) | SIGN
    if operand.absolute:
        return lambda wave: source(wave) & REST
    if operand.negate:
        return lambda wave: source(wave) ^ SIGN
    return source


def _plain(operand: Register, half: int) -> Source:
    if operand.is_scalar:
        number = operand.first + half
        return lambda wave: np.uint32(wave.scalars[number])
    row = operand.row + half
    return lambda wave: wave.rows[row]


def _selected(source: Source, select: str, extend: bool, instruction: Instruction) -> Source:
    if select == "DWORD":
        if extend:
            raise unknown(instruction, "sext of a whole register is not known")
        return source
    if select not in SELECTIONS:
        raise unknown(instruction, f"the selection {select} is not known")
    start, width = SELECTIONS[select]
    if extend:
        up, down = np.uint32(32 - start - width), np.int32(32 - width)
        return lambda wave: ((source(wave) << up).view(np.int32) >> down).view(np.uint32)
    shift, part = np.uint32(start), np.uint32((1 << width) - 1)
    return lambda wave: source(wave) >> shift & part


def wide_source(operand: Operand, instruction: Instruction) -> Source:
    """Read 64 bits a lane."""
    if isinstance(operand, Constant):
        value = np.uint64(bits_of(operand, 64, instruction))
        return lambda wave: value
    found = register(operand, instruction, count=2)
    if found.is_scalar:
        first = found.first
        return lambda wave: np.uint64(wave.pair(first))
    row, shift = found.row, np.uint64(32)
    return lambda wave: wave.rows[row] | wave.rows[row + 1].astype(np.uint64) << shift
