"""Vector instructions with a mask, a bit a lane in two scalar registers: comparisons, carries, selection, division."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epfuse.aot.isa import floats, shadows
from epfuse.aot.isa.floats import f32
from epfuse.aot.isa.operands import Source, Value, expect, mask_of, register, unknown, vector_source, wide_source
from epfuse.aot.isa.program import Instruction, Operand
from epfuse.aot.isa.registers import EXEC, VCC, VECTORS, Register
from epfuse.aot.isa.wave import FULL, Lanes, Step, Wave, lanes_of
from epfuse.aot.isa.wave import mask_of as lanes_mask

Test = Callable[[Value, Value], Value]
_INTEGER: dict[str, Test] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "ge": np.greater_equal,
}
_FLOAT: dict[str, Test] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": np.greater_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~np.greater_equal(a, b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~np.greater(a, b),
    "nle": lambda a, b: ~np.less_equal(a, b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~np.less(a, b),
}
_READINGS: dict[str, Callable[[Value], Value]] = {
    "u32": lambda value: value,
    "i32": lambda value: value.view(np.int32),
    "u16": lambda value: value & np.uint32(0xFFFF),
    "i16": lambda value: (value << np.uint32(16)).view(np.int32),
    "f32": f32,
    "u64": lambda value: value,
    "i64": lambda value: value.view(np.int64),
}


def decode(name: str, suffix: str, instruction: Instruction) -> Step | None:
    """A step; None if ``name`` is not in this room."""
    if name.startswith("v_cmp_"):
        return _compare(name, suffix, instruction)
    if name == "v_cndmask_b32":
        return _select(name, suffix, instruction)
    if name in (
        "v_add_co_u32",
        "v_sub_co_u32",
        "v_subrev_co_u32",
        "v_addc_co_u32",
        "v_subb_co_u32",
        "v_subbrev_co_u32",
    ):
        return _carry(name, instruction)
    if name == "v_div_scale_f32":
        return _division_scale(name, instruction)
    if name == "v_div_fmas_f32":
        return _division_step(name, instruction)
    return None


def condition_of(operand: Operand, instruction: Instruction) -> Callable[[Wave], Lanes]:
    """Read a mask as one truth value a lane."""
    first = register(operand, instruction, scalar=True, count=2).first
    return lambda wave: lanes_of(wave.pair(first))


def write_mask(wave: Wave, first: int, truth: Value) -> None:
    """Write a mask; its bits are zero in lanes that are not active."""
    found = lanes_mask(truth if np.shape(truth) else np.full(64, truth))
    wave.set_pair(first, found if wave.lanes is None else found & wave.pair(EXEC))


def _parts(operands: tuple[Operand, ...], instruction: Instruction, *, floating: bool) -> list[Source]:
    """The operands, each in the part that SDWA selects of it."""
    selected = [str(instruction.modifiers.get(f"src{place}_sel", "DWORD")) for place in range(len(operands))]
    return [
        vector_source(operand, instruction, floating=floating, select=part)
        for operand, part in zip(operands, selected, strict=True)
    ]


def _compare(name: str, suffix: str, instruction: Instruction) -> Step:
    order, _, reading = name.removeprefix("v_cmp_").rpartition("_")
    tests = _FLOAT if reading == "f32" else _INTEGER
    if order not in tests or reading not in _READINGS or suffix == "_dpp":
        raise unknown(instruction, "the comparison is not known")
    expect(instruction, 3, *(("src0_sel", "src1_sel") if suffix == "_sdwa" else ()))
    target, left, right = instruction.operands
    first = register(target, instruction, scalar=True, count=2).first
    if suffix == "_e32" and first != VCC:
        raise unknown(instruction, "this encoding writes vcc")
    test, read = tests[order], _READINGS[reading]
    if reading.endswith("64"):
        a, b = wide_source(left, instruction), wide_source(right, instruction)
    else:
        a, b = _parts((left, right), instruction, floating=reading == "f32")

    def run(wave: Wave) -> None:
        write_mask(wave, first, test(read(a(wave)), read(b(wave))))

    shade = shadows.compared(first, (left, right))
    return Step(instruction, name, "valu", run, mask_of(left, right) | 3 << EXEC, 3 << first, shade)


def _select(name: str, suffix: str, instruction: Instruction) -> Step:
    expect(instruction, 4, *(("dst_sel", "dst_unused", "src0_sel", "src1_sel") if suffix == "_sdwa" else ()))
    if instruction.modifiers.get("dst_sel", "DWORD") != "DWORD" or suffix == "_dpp":
        raise unknown(instruction, "this form of the selection is not known")
    target, left, right, mask = instruction.operands
    row = register(target, instruction, scalar=False).row
    a, b = _parts((left, right), instruction, floating=suffix == "_e64")
    condition = condition_of(mask, instruction)

    def run(wave: Wave) -> None:
        wave.write(row, np.where(condition(wave), b(wave), a(wave)))

    def shade(wave: Wave) -> None:
        unsure = lanes_of(shadows.mask_shadow(mask, wave))
        if suffix == "_sdwa":
            inputs = [shadows.lanes_with(operand, wave) for operand in (left, right)]
        else:
            inputs = [shadows.shadow_of(operand, wave) for operand in (left, right)]
        wave.shade(row, shadows.chosen(inputs[0], inputs[1], a(wave), b(wave), condition(wave), unsure))

    reads = mask_of(left, right, mask) | 3 << EXEC
    return Step(instruction, name, "valu", run, reads, 1 << (row + VECTORS), shade)


def _carry(name: str, instruction: Instruction) -> Step:
    carried = name in ("v_addc_co_u32", "v_subb_co_u32", "v_subbrev_co_u32")
    expect(instruction, 5 if carried else 4)
    target, out, left, right, *rest = instruction.operands
    row = register(target, instruction, scalar=False).row
    first = register(out, instruction, scalar=True, count=2).first
    if "rev" in name:
        left, right = right, left
    a, b = vector_source(left, instruction), vector_source(right, instruction)
    carry = condition_of(rest[0], instruction) if rest else None
    subtracts = name.startswith("v_sub")

    def run(wave: Wave) -> None:
        more = np.int64(0) if carry is None else carry(wave).astype(np.int64)
        x, y = a(wave).astype(np.int64), b(wave).astype(np.int64)
        total = x - y - more if subtracts else x + y + more
        write_mask(wave, first, (total < 0) | (total >> 32 > 0))
        wave.write(row, np.asarray(total & 0xFFFFFFFF).astype(np.uint32))

    def shade(wave: Wave) -> None:
        unsure = lanes_of(shadows.mask_shadow(rest[0], wave)) if rest else np.False_
        found = shadows.lanes_with(left, wave) | shadows.lanes_with(right, wave)
        found = np.broadcast_to(np.where(unsure, FULL, found), (64,))
        undefined = lanes_mask(found != 0) & wave.pair(EXEC)
        wave.shade_scalar(first, undefined & 0xFFFFFFFF)
        wave.shade_scalar(first + 1, undefined >> 32)
        wave.shade(row, found)

    reads = mask_of(left, right, *rest) | 3 << EXEC
    return Step(instruction, name, "valu", run, reads, 1 << (row + VECTORS) | 3 << first, shade)


def _division_scale(name: str, instruction: Instruction) -> Step:
    expect(instruction, 5)
    target, out, *operands = instruction.operands
    row = register(target, instruction, scalar=False).row
    first = register(out, instruction, scalar=True, count=2).first
    if operands[0] not in operands[1:]:
        raise unknown(instruction, "the first source must be the denominator or the numerator")
    sources = [vector_source(operand, instruction, floating=True) for operand in operands]

    def run(wave: Wave) -> None:
        value, scale = floats.division_scale(*[source(wave) for source in sources])
        write_mask(wave, first, scale)
        wave.write(row, value)

    value_shade = shadows.computed(range(row, row + 1), tuple(operands))
    mask_shade = shadows.compared(first, tuple(operands))

    def shade(wave: Wave) -> None:
        mask_shade(wave)
        value_shade(wave)

    reads = mask_of(*operands) | 3 << EXEC
    return Step(instruction, name, "valu", run, reads, 1 << (row + VECTORS) | 3 << first, shade)


def _division_step(name: str, instruction: Instruction) -> Step:
    expect(instruction, 4)
    target, *operands = instruction.operands
    row = register(target, instruction, scalar=False).row
    a, b, c = (vector_source(operand, instruction, floating=True) for operand in operands)
    plain = shadows.computed(range(row, row + 1), tuple(operands))
    vcc = Register(VCC, 2)

    def run(wave: Wave) -> None:
        wave.write(row, floats.division_step(a(wave), b(wave), c(wave), lanes_of(wave.pair(VCC))))

    def shade(wave: Wave) -> None:
        plain(wave)
        unsure = lanes_of(shadows.mask_shadow(vcc, wave)) & wave.active()
        if unsure.any():
            wave.shade(row, FULL, unsure)

    reads = mask_of(*operands) | 3 << VCC | 3 << EXEC
    return Step(instruction, name, "valu", run, reads, 1 << (row + VECTORS), shade, facts={"division": 1})
