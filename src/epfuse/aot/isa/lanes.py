"""Vector instructions across lanes: DPP, and reading one lane into a scalar register."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa import shadows
from epfuse.aot.isa.operands import Source, Value, expect, mask_of, register, unknown
from epfuse.aot.isa.program import Constant, Instruction, Operand
from epfuse.aot.isa.registers import EXEC, LANES, VECTORS
from epfuse.aot.isa.wave import FULL, Lanes, Step, Wave

LANE = np.arange(LANES)
CONTROLS = ("quad_perm", "row_shl", "row_shr", "row_ror", "row_bcast", "row_mirror", "row_half_mirror")
MODIFIERS = (*CONTROLS, "row_mask", "bank_mask", "bound_ctrl")


def decode(name: str, suffix: str, instruction: Instruction) -> Step | None:
    """A step that reads a lane; None if ``name`` is none."""
    if name not in ("v_readfirstlane_b32", "v_readlane_b32"):
        return None
    expect(instruction, 2 if name == "v_readfirstlane_b32" else 3)
    target, operand, *rest = instruction.operands
    number = register(target, instruction, scalar=True).first
    source = register(operand, instruction, scalar=False)
    row = source.row
    chosen = None
    if rest:
        if not isinstance(rest[0], Constant) or rest[0].value not in range(LANES):
            raise unknown(instruction, "the lane must be a constant")
        chosen = int(rest[0].value)

    def lane(wave: Wave) -> int:
        if chosen is not None:
            return chosen
        mask = wave.pair(EXEC)
        return (mask & -mask).bit_length() - 1 if mask else 0

    def run(wave: Wave) -> None:
        wave.scalars[number] = int(wave.rows[row][lane(wave)])

    def shade(wave: Wave) -> None:
        wave.shade_scalar(number, int(wave.shadows[row][lane(wave)]))

    reads = source.mask | (0 if rest else 3 << EXEC)
    return Step(instruction, name, "valu", run, reads, 1 << number, shade, near=True, facts={"lane": 1})


def _pattern(instruction: Instruction) -> tuple[NDArray[np.int64], Lanes]:
    """From which lane each lane takes, and whether there is such a lane."""
    controls = [name for name in CONTROLS if name in instruction.modifiers]
    if len(controls) != 1:
        raise unknown(instruction, "one DPP control is needed")
    [control] = controls
    value = instruction.modifiers[control]
    everywhere = np.ones(LANES, np.bool_)
    if control == "quad_perm" and isinstance(value, tuple) and len(value) == 4 and all(0 <= each < 4 for each in value):
        return LANE // 4 * 4 + np.array(value)[LANE % 4], everywhere
    if control == "row_mirror" and value is True:
        return LANE // 16 * 16 + 15 - LANE % 16, everywhere
    if control == "row_half_mirror" and value is True:
        return LANE // 8 * 8 + 7 - LANE % 8, everywhere
    if control == "row_bcast" and value == 15:
        return np.maximum(LANE // 16 * 16 - 1, 0), LANE >= 16
    if control == "row_bcast" and value == 31:
        return np.full(LANES, 31), LANE >= 32
    if isinstance(value, int) and value is not True and 1 <= value <= 15:
        place = LANE % 16
        if control == "row_ror":
            return LANE // 16 * 16 + (place - value) % 16, everywhere
        if control == "row_shr":
            return np.maximum(LANE - value, 0), place >= value
        if control == "row_shl":
            return np.minimum(LANE + value, LANES - 1), place + value < 16
    raise unknown(instruction, f"{control} with {value} is not known")


def permuted(
    name: str,
    instruction: Instruction,
    row: int,
    sources: tuple[Source, ...],
    function: Callable[..., Value],
    operands: tuple[Operand, ...],
) -> Step:
    """A vector instruction whose first source comes from other lanes.

    A lane whose source is missing or not active reads 0 with ``bound_ctrl``, and is not written without. LLVM's syntax
    for this GPU takes ``bound_ctrl:0`` for ``bound_ctrl:1``, and prints the latter.
    """
    pattern, exists = _pattern(instruction)
    rows, banks = (_four(instruction, each) for each in ("row_mask", "bank_mask"))
    written = np.array([bool(rows >> (lane // 16) & 1 and banks >> (lane // 4 % 4) & 1) for lane in range(LANES)])
    bound = instruction.modifiers.get("bound_ctrl")
    if bound is True or bound not in (None, 1):
        raise unknown(instruction, "bound_ctrl must be 1")
    zeroes = bound is not None
    first = register(operands[0], instruction, scalar=False, modified=True)

    def lanes(wave: Wave) -> tuple[Lanes, Lanes]:
        active = wave.active()
        there = exists & active[pattern]
        return there, active & written & (there if not zeroes else True)

    def run(wave: Wave) -> None:
        there, target = lanes(wave)
        moved = np.where(there, sources[0](wave)[pattern], np.uint32(0))
        value = function(moved, *[source(wave) for source in sources[1:]])
        np.copyto(wave.rows[row], value, where=target)

    def shade(wave: Wave) -> None:
        there, target = lanes(wave)
        found = np.where(there, wave.shadows[first.row][pattern], shadows.NONE)
        if len(operands) > 1:
            for operand in operands[1:]:
                found = found | shadows.lanes_with(operand, wave)
            found = np.where(found != 0, FULL, shadows.NONE)
        wave.shade(row, found, target)

    reads = mask_of(*operands) | 3 << EXEC
    target = 1 << (row + VECTORS)
    return Step(instruction, name, "valu", run, reads | target, target, shade, near=True, facts={"dpp": 1})


def _four(instruction: Instruction, name: str) -> int:
    value = instruction.modifiers.get(name)
    if not isinstance(value, int) or value is True or not 0 <= value <= 15:
        raise unknown(instruction, f"{name} must be 0x0 to 0xf")
    return value
