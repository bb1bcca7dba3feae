"""Which bits of a vector result are undefined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epfuse.aot.isa.operands import Source, Value
from epfuse.aot.isa.program import Operand
from epfuse.aot.isa.registers import Register
from epfuse.aot.isa.wave import FULL, Lanes, Wave, mask_of

NONE = np.uint32(0)
Shade = Callable[[Wave], None]


def shadow_of(operand: Operand, wave: Wave, half: int = 0) -> Value:
    """The undefined bits of an operand's register; none of a constant."""
    if not isinstance(operand, Register):
        return NONE
    number = operand.first + half
    return np.uint32(wave.scalar_shadows[number]) if operand.is_scalar else wave.shadows[operand.row + half]


def lanes_with(operand: Operand, wave: Wave) -> Value:
    """All ones in the lanes in which an operand has an undefined bit in any of its registers."""
    found: Value = NONE
    if isinstance(operand, Register):
        for half in range(operand.count):
            found = found | shadow_of(operand, wave, half)
    return np.where(found != 0, FULL, NONE)


def mask_shadow(operand: Operand, wave: Wave) -> int:
    """The undefined bits of a mask, one a lane."""
    if not isinstance(operand, Register):
        return 0
    return wave.scalar_shadows[operand.first] | wave.scalar_shadows[operand.first + 1] << 32


def computed(rows: range, operands: tuple[Operand, ...]) -> Shade:
    """Every bit of a lane is undefined if one of the lane's operands has an undefined bit."""

    def shade(wave: Wave) -> None:
        found: Value = NONE
        for operand in operands:
            found = found | lanes_with(operand, wave)
        for row in rows:
            wave.shade(row, found)

    return shade


def moved(
    row: int,
    operands: tuple[Operand, ...],
    sources: tuple[Source, ...],
    function: Callable[..., Value],
    controls: tuple[int, ...],
) -> Shade:
    """Bits go where ``function`` puts them, if what says where is defined."""
    fallback = computed(range(row, row + 1), operands)

    def shade(wave: Wave) -> None:
        for place in controls:
            if np.any(shadow_of(operands[place], wave) != 0):
                fallback(wave)
                return
        inputs = [
            source(wave) if place in controls else shadow_of(operand, wave)
            for place, (operand, source) in enumerate(zip(operands, sources, strict=True))
        ]
        wave.shade(row, function(*inputs))

    return shade


def masked(row: int, operands: tuple[Operand, ...], sources: tuple[Source, ...], *, neutral: bool) -> Shade:
    """Of ``and`` (neutral True) and ``or``: a defined 0, or 1, settles the bit."""
    flip = NONE if neutral else FULL

    def shade(wave: Wave) -> None:
        a, b = (source(wave) ^ flip for source in sources)
        x, y = (shadow_of(operand, wave) for operand in operands)
        wave.shade(row, (x & (b | y)) | (y & (a | x)))

    return shade


def compared(first: int, operands: tuple[Operand, ...]) -> Shade:
    """A mask's bit is undefined if its lane's operands have an undefined bit."""

    def shade(wave: Wave) -> None:
        found: Value = NONE
        for operand in operands:
            found = found | lanes_with(operand, wave)
        lanes = np.broadcast_to(found != 0, (64,)) & wave.active()
        mask = mask_of(lanes) if lanes.any() else 0
        wave.shade_scalar(first, mask & 0xFFFFFFFF)
        wave.shade_scalar(first + 1, mask >> 32)

    return shade


def chosen(shadow_a: Value, shadow_b: Value, a: Value, b: Value, condition: Lanes, unsure: Lanes) -> Value:
    """Of ``condition ? b : a``; where the condition is undefined, the bits in which the two differ are, too."""
    either = np.where(condition, shadow_b, shadow_a)
    return np.where(unsure, shadow_a | shadow_b | (a ^ b), either)
