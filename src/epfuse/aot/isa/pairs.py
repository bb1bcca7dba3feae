"""Vector instructions with operands or results of 64 bits: packed floats, conversions of two, wide integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epfuse.aot.isa import floats, shadows
from epfuse.aot.isa.floats import bits, f32
from epfuse.aot.isa.masks import write_mask
from epfuse.aot.isa.operands import Source, Value, expect, mask_of, register, unknown, vector_source, wide_source
from epfuse.aot.isa.program import Constant, Instruction, Operand
from epfuse.aot.isa.registers import EXEC, VECTORS, Register
from epfuse.aot.isa.wave import FULL, Step, Wave

U64 = np.uint64
SIGN = np.uint32(1 << 31)
PACKED: dict[str, tuple[int, Callable[..., Value]]] = {
    "v_pk_add_f32": (2, lambda a, b: bits(f32(a) + f32(b))),
    "v_pk_mul_f32": (2, lambda a, b: bits(f32(a) * f32(b))),
    "v_pk_fma_f32": (3, floats.fused),
}


def _arithmetic_shift(data: Value, amount: Value) -> Value:
    return (data.view(np.int64) >> amount.astype(np.int64)).view(U64)


SHIFTS: dict[str, Callable[[Value, Value], Value]] = {
    "v_lshlrev_b64": np.left_shift,
    "v_lshrrev_b64": np.right_shift,
    "v_ashrrev_i64": _arithmetic_shift,
}


def decode(name: str, suffix: str, instruction: Instruction) -> Step | None:
    """A step; None if ``name`` is not in this room."""
    if name in PACKED:
        return _packed(name, instruction)
    if name == "v_cvt_pk_f32_fp8":
        return _from_fp8(name, suffix, instruction)
    if name in ("v_mov_b64", "v_lshl_add_u64", *SHIFTS):
        return _wide(name, instruction)
    if name == "v_mad_u64_u32":
        return _multiply_add(name, instruction)
    return None


def _write_wide(wave: Wave, row: int, value: Value) -> None:
    low, high = np.asarray(value & U64(0xFFFFFFFF)).astype(np.uint32), np.asarray(value >> U64(32)).astype(np.uint32)
    wave.write(row, low)
    wave.write(row + 1, high)


@dataclass(frozen=True)
class _Half:
    """What one of two results takes of an operand: its low or its high register, and with which sign."""

    operand: Operand
    high: int
    negated: int

    def source(self, instruction: Instruction) -> Source:
        """Read it."""
        source = vector_source(self.operand, instruction, half=self.high)
        return (lambda wave: source(wave) ^ SIGN) if self.negated else source


def _halves(instruction: Instruction, operands: tuple[Operand, ...]) -> list[list[_Half]]:
    """For the low and the high result what each takes of the operands."""

    def bits(modifier: str, default: int) -> tuple[int, ...]:
        chosen = instruction.modifiers.get(modifier, (default,) * len(operands))
        if not isinstance(chosen, tuple) or len(chosen) != len(operands) or any(bit not in (0, 1) for bit in chosen):
            raise unknown(instruction, f"{modifier} must say 0 or 1 for each source")
        return chosen

    taken = []
    for half, sign, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
        each = [_Half(*parts) for parts in zip(operands, bits(half, default), bits(sign, 0), strict=True)]
        for part in each:
            if isinstance(part.operand, Constant) and (part.high or part.negated):
                raise unknown(instruction, "the high half of a constant, or its sign changed, is not known")
        taken.append(each)
    return taken


def _packed(name: str, instruction: Instruction) -> Step:
    count, function = PACKED[name]
    expect(instruction, count + 1, "op_sel", "op_sel_hi", "neg_lo", "neg_hi")
    target, *operands = instruction.operands
    row = register(target, instruction, scalar=False, count=2).row
    for operand in operands:
        if isinstance(operand, Register):
            register(operand, instruction, count=2)
    taken = _halves(instruction, tuple(operands))
    low, high = ([part.source(instruction) for part in each] for each in taken)

    def run(wave: Wave) -> None:
        first = function(*[source(wave) for source in low])
        second = function(*[source(wave) for source in high])
        wave.write(row, first)
        wave.write(row + 1, second)

    def shade(wave: Wave) -> None:
        found = []
        for each in taken:
            shadow: Value = shadows.NONE
            for part in each:
                shadow = shadow | shadows.shadow_of(part.operand, wave, part.high)
            found.append(np.where(shadow != 0, FULL, shadows.NONE))
        wave.shade(row, found[0])
        wave.shade(row + 1, found[1])

    reads = mask_of(*operands) | 3 << EXEC
    return Step(instruction, name, "valu", run, reads, 3 << (row + VECTORS), shade)


def _from_fp8(name: str, suffix: str, instruction: Instruction) -> Step:
    expect(instruction, 2, *(("src0_sel",) if suffix == "_sdwa" else ()))
    target, operand = instruction.operands
    row = register(target, instruction, scalar=False, count=2).row
    select = instruction.modifiers.get("src0_sel", "WORD_0")
    if select not in ("WORD_0", "WORD_1"):
        raise unknown(instruction, "the source must be a word")
    source, first = vector_source(operand, instruction), 0 if select == "WORD_0" else 2

    def run(wave: Wave) -> None:
        value = source(wave)
        low, high = floats.from_fp8(value, first), floats.from_fp8(value, first + 1)
        wave.write(row, low)
        wave.write(row + 1, high)

    def shade(wave: Wave) -> None:
        shadow = shadows.shadow_of(operand, wave)
        parts = [shadow >> np.uint32(8 * (first + place)) & np.uint32(255) for place in range(2)]
        for place, part in enumerate(parts):
            wave.shade(row + place, np.where(part != 0, FULL, shadows.NONE))

    return Step(instruction, name, "valu", run, mask_of(operand) | 3 << EXEC, 3 << (row + VECTORS), shade)


def _wide(name: str, instruction: Instruction) -> Step:
    expect(instruction, {"v_mov_b64": 2, "v_lshl_add_u64": 4}.get(name, 3))
    target, *operands = instruction.operands
    row = register(target, instruction, scalar=False, count=2).row
    run: Callable[[Wave], None]
    if name == "v_mov_b64":
        source = wide_source(operands[0], instruction)

        def run(wave: Wave) -> None:
            _write_wide(wave, row, source(wave))

    elif name == "v_lshl_add_u64":
        a, shift, c = (
            wide_source(operands[0], instruction),
            vector_source(operands[1], instruction),
            wide_source(operands[2], instruction),
        )

        def run(wave: Wave) -> None:
            _write_wide(wave, row, (a(wave) << (shift(wave) & np.uint32(7)).astype(U64)) + c(wave))

    else:
        amount, data = vector_source(operands[0], instruction), wide_source(operands[1], instruction)
        shifted = SHIFTS[name]

        def run(wave: Wave) -> None:
            _write_wide(wave, row, shifted(data(wave), (amount(wave) & np.uint32(63)).astype(U64)))

    shade = shadows.computed(range(row, row + 2), tuple(operands))
    if name == "v_mov_b64":
        shade = _shade_move(row, operands[0])
    return Step(instruction, name, "valu", run, mask_of(*operands) | 3 << EXEC, 3 << (row + VECTORS), shade)


def _shade_move(row: int, operand: Operand) -> shadows.Shade:
    def shade(wave: Wave) -> None:
        found = [np.copy(shadows.shadow_of(operand, wave, half)) for half in range(2)]
        for half, shadow in enumerate(found):
            wave.shade(row + half, shadow)

    return shade


def _multiply_add(name: str, instruction: Instruction) -> Step:
    expect(instruction, 5)
    target, out, left, right, add = instruction.operands
    row = register(target, instruction, scalar=False, count=2).row
    first = register(out, instruction, scalar=True, count=2).first
    a, b, c = vector_source(left, instruction), vector_source(right, instruction), wide_source(add, instruction)

    def run(wave: Wave) -> None:
        product, more = a(wave).astype(U64) * b(wave).astype(U64), c(wave)
        total = product + more
        write_mask(wave, first, total < more)
        _write_wide(wave, row, total)

    operands = (left, right, add)
    value_shade, mask_shade = shadows.computed(range(row, row + 2), operands), shadows.compared(first, operands)

    def shade(wave: Wave) -> None:
        # the low half of the sum depends on the low half of the addend alone
        low = shadows.lanes_with(left, wave) | shadows.lanes_with(right, wave) | shadows.shadow_of(add, wave)
        low = np.where(low != 0, FULL, shadows.NONE)
        mask_shade(wave)
        value_shade(wave)
        wave.shade(row, low)

    return Step(
        instruction, name, "valu", run, mask_of(*operands) | 3 << EXEC, 3 << (row + VECTORS) | 3 << first, shade
    )
