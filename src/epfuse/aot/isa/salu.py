"""Scalar arithmetic: SOP1, SOP2, SOPC, SOPK."""

from __future__ import annotations

import operator
from collections.abc import Callable

from epfuse.aot.isa.operands import expect, mask_of, register, scalar_source, unknown
from epfuse.aot.isa.program import Constant, Instruction
from epfuse.aot.isa.registers import EXEC, SCC
from epfuse.aot.isa.wave import Step, Wave, refuse_undefined

Result = tuple[int, int | None]
"""A value and what SCC becomes; None leaves it."""
WORD, PAIR = 0xFFFFFFFF, (1 << 64) - 1


def signed(value: int) -> int:
    """32 bits read as a signed number."""
    return value - (1 << 32) if value >> 31 else value


def _logic(function: Callable[[int, int], int], most: int) -> Callable[[int, int], Result]:
    def run(a: int, b: int) -> Result:
        value = function(a, b) & most
        return value, int(value != 0)

    return run


def _sum(shift: int) -> Callable[[int, int], Result]:
    def run(a: int, b: int) -> Result:
        total = (a << shift) + b
        return total & WORD, int(total > WORD)

    return run


def _add_i32(a: int, b: int) -> Result:
    total = signed(a) + signed(b)
    return total & WORD, int(signed(total & WORD) != total)


def _sub_i32(a: int, b: int) -> Result:
    difference = signed(a) - signed(b)
    return difference & WORD, int(signed(difference & WORD) != difference)


def _sub_u32(a: int, b: int) -> Result:
    return (a - b) & WORD, int(b > a)


def _pick(better: Callable[[int, int], bool], read: Callable[[int], int]) -> Callable[[int, int], Result]:
    def run(a: int, b: int) -> Result:
        return (a, 1) if better(read(a), read(b)) else (b, 0)

    return run


def _field(a: int, b: int, *, extend: bool) -> Result:
    start, width = b & 31, b >> 16 & 127
    # bits beyond the register repeat the sign, or are zero
    value = (signed(a) if extend else a) >> start & ((1 << width) - 1)
    if extend and width and value >> (width - 1) & 1:
        value -= 1 << width
    return value & WORD, int(value & WORD != 0)


TWO: dict[str, tuple[int, Callable[[int, int], Result]]] = {
    "s_add_u32": (32, _sum(0)),
    "s_add_i32": (32, _add_i32),
    "s_sub_u32": (32, _sub_u32),
    "s_sub_i32": (32, _sub_i32),
    "s_mul_i32": (32, lambda a, b: (a * b & WORD, None)),
    "s_mul_hi_u32": (32, lambda a, b: (a * b >> 32, None)),
    "s_mul_hi_i32": (32, lambda a, b: (signed(a) * signed(b) >> 32 & WORD, None)),
    "s_min_i32": (32, _pick(operator.lt, signed)),
    "s_max_i32": (32, _pick(operator.ge, signed)),
    "s_min_u32": (32, _pick(operator.lt, int)),
    "s_max_u32": (32, _pick(operator.ge, int)),
    "s_and_b32": (32, _logic(operator.and_, WORD)),
    "s_or_b32": (32, _logic(operator.or_, WORD)),
    "s_xor_b32": (32, _logic(operator.xor, WORD)),
    "s_andn2_b32": (32, _logic(lambda a, b: a & ~b, WORD)),
    "s_and_b64": (64, _logic(operator.and_, PAIR)),
    "s_or_b64": (64, _logic(operator.or_, PAIR)),
    "s_xor_b64": (64, _logic(operator.xor, PAIR)),
    "s_andn2_b64": (64, _logic(lambda a, b: a & ~b, PAIR)),
    "s_lshl_b32": (32, _logic(lambda a, b: a << (b & 31), WORD)),
    "s_lshr_b32": (32, _logic(lambda a, b: a >> (b & 31), WORD)),
    "s_ashr_i32": (32, _logic(lambda a, b: signed(a) >> (b & 31), WORD)),
    "s_bfe_u32": (32, lambda a, b: _field(a, b, extend=False)),
    "s_bfe_i32": (32, lambda a, b: _field(a, b, extend=True)),
    "s_lshl1_add_u32": (32, _sum(1)),
    "s_lshl2_add_u32": (32, _sum(2)),
    "s_lshl3_add_u32": (32, _sum(3)),
    "s_lshl4_add_u32": (32, _sum(4)),
}
"""Bits of the operands and the result, and what is done."""

SHIFTS_64: dict[str, Callable[[int, int], Result]] = {
    "s_lshl_b64": _logic(lambda a, b: a << (b & 63), PAIR),
    "s_lshr_b64": _logic(lambda a, b: a >> (b & 63), PAIR),
}

ONE: dict[str, tuple[int, Callable[[int], Result]]] = {
    "s_mov_b32": (32, lambda a: (a, None)),
    "s_mov_b64": (64, lambda a: (a, None)),
    "s_not_b32": (32, lambda a: (~a & WORD, int(a != WORD))),
    "s_not_b64": (64, lambda a: (~a & PAIR, int(a != PAIR))),
    "s_brev_b32": (32, lambda a: (int(f"{a:032b}"[::-1], 2), None)),
    "s_abs_i32": (32, lambda a: (abs(signed(a)) & WORD, int(a != 0))),
}

_ORDERS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "lg": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


def decode(name: str, instruction: Instruction) -> Step | None:
    """A step of scalar arithmetic; None if ``name`` is none."""
    if name in TWO:
        bits, two = TWO[name]
        step = _arithmetic(name, instruction, bits, (bits, bits), two)
        if name in ("s_and_b64", "s_or_b64", "s_andn2_b64") and not step.writes >> EXEC & 3:
            step.shade = _shade_mask(name, instruction)
        return step
    if name in SHIFTS_64:
        return _arithmetic(name, instruction, 64, (64, 32), SHIFTS_64[name])
    if name in ONE:
        bits, one = ONE[name]
        return _arithmetic(name, instruction, bits, (bits,), one)
    if name in ("s_addc_u32", "s_subb_u32"):
        return _carried(name, instruction)
    if name in ("s_cselect_b32", "s_cselect_b64"):
        return _select(name, instruction)
    if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
        return _short(name, instruction)
    if name in ("s_and_saveexec_b64", "s_or_saveexec_b64"):
        return _save(name, instruction)
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        return _compare(name, instruction, 32, lambda a, b: a >> (b & 31) & 1 == int(name == "s_bitcmp1_b32"))
    head, _, rest = name.partition("_")
    kind, _, rest = rest.partition("_")
    order, _, reading = rest.partition("_")
    if head == "s" and kind in ("cmp", "cmpk") and order in _ORDERS and reading in ("i32", "u32", "u64"):
        return _ordered(name, instruction, _ORDERS[order], reading, short=kind == "cmpk")
    return None


def _shade(reads: int, *writes: tuple[int, int]) -> Callable[[Wave], None]:
    """All bits of the results are undefined if any of an operand's is."""

    def shade(wave: Wave) -> None:
        shadow = WORD if wave.undefined & reads else 0
        for first, count in writes:
            for number in range(first, first + count):
                wave.shade_scalar(number, shadow)

    return shade


def _step(
    name: str, instruction: Instruction, run: Callable[[Wave], None], reads: int, *writes: tuple[int, int]
) -> Step:
    written = 0
    for first, count in writes:
        written |= ((1 << count) - 1) << first
    shade = _shade(reads, *writes)
    if written >> EXEC & 3:
        shade = refuse_undefined(reads, instruction, "which lanes are active")
    return Step(instruction, name, "salu", run, reads, written, shade)


def _arithmetic(
    name: str, instruction: Instruction, bits: int, widths: tuple[int, ...], function: Callable[..., Result]
) -> Step:
    """Of operands of such widths, in bits; the result has ``bits``."""
    expect(instruction, 1 + len(widths))
    target, *operands = instruction.operands
    first = register(target, instruction, scalar=True, count=bits // 32).first
    sources = [scalar_source(each, instruction, width) for each, width in zip(operands, widths, strict=True)]
    sets_scc = function(*[0] * len(widths))[1] is not None

    def run(wave: Wave) -> None:
        value, scc = function(*[source(wave) for source in sources])
        _write(wave, first, bits, value)
        if scc is not None:
            wave.scalars[SCC] = scc

    return _step(name, instruction, run, mask_of(*operands), (first, bits // 32), *([(SCC, 1)] if sets_scc else []))


def _write(wave: Wave, first: int, bits: int, value: int) -> None:
    if bits == 64:
        wave.set_pair(first, value)
    else:
        wave.scalars[first] = value


def _shade_mask(name: str, instruction: Instruction) -> Callable[[Wave], None]:
    """Lane by lane: 0 and anything is 0, 1 or anything is 1."""
    target, left, right = instruction.operands
    first = register(target, instruction, scalar=True, count=2).first
    values = [scalar_source(each, instruction, 64) for each in (left, right)]

    def shadow_of(wave: Wave, operand: object) -> int:
        if isinstance(operand, Constant):
            return 0
        number = register(operand, instruction, scalar=True, count=2).first  # type: ignore[arg-type]
        return wave.scalar_shadows[number] | wave.scalar_shadows[number + 1] << 32

    def shade(wave: Wave) -> None:
        a, b = (value(wave) for value in values)
        unknown_a, unknown_b = shadow_of(wave, left), shadow_of(wave, right)
        if name == "s_andn2_b64":
            b ^= PAIR
        if name == "s_or_b64":
            a, b = a ^ PAIR, b ^ PAIR
        shadow = unknown_a & (b | unknown_b) | unknown_b & (a | unknown_a)
        wave.shade_scalar(first, shadow & WORD)
        wave.shade_scalar(first + 1, shadow >> 32)
        wave.shade_scalar(SCC, 1 if shadow else 0)

    return shade


def _carried(name: str, instruction: Instruction) -> Step:
    expect(instruction, 3)
    target, left, right = instruction.operands
    first = register(target, instruction, scalar=True).first
    a, b = scalar_source(left, instruction), scalar_source(right, instruction)
    sign = 1 if name == "s_addc_u32" else -1

    def run(wave: Wave) -> None:
        total = a(wave) + sign * (b(wave) + wave.scalars[SCC])
        wave.scalars[first], wave.scalars[SCC] = total & WORD, int(not 0 <= total <= WORD)

    return _step(name, instruction, run, mask_of(left, right) | 1 << SCC, (first, 1), (SCC, 1))


def _select(name: str, instruction: Instruction) -> Step:
    expect(instruction, 3)
    bits = int(name[-2:])
    target, left, right = instruction.operands
    first = register(target, instruction, scalar=True, count=bits // 32).first
    a, b = scalar_source(left, instruction, bits), scalar_source(right, instruction, bits)

    def run(wave: Wave) -> None:
        _write(wave, first, bits, a(wave) if wave.scalars[SCC] else b(wave))

    return _step(name, instruction, run, mask_of(left, right) | 1 << SCC, (first, bits // 32))


def _short(name: str, instruction: Instruction) -> Step:
    """A 16-bit constant, extended by its sign."""
    expect(instruction, 2)
    target, operand = instruction.operands
    first = register(target, instruction, scalar=True).first
    constant = _sixteen(operand, instruction, extend=True)

    def run(wave: Wave) -> None:
        own = wave.scalars[first]
        if name == "s_movk_i32":
            wave.scalars[first] = constant
        elif name == "s_addk_i32":
            wave.scalars[first], wave.scalars[SCC] = _add_i32(own, constant)  # type: ignore[assignment]
        else:
            wave.scalars[first] = own * constant & WORD

    own = 0 if name == "s_movk_i32" else 1 << first
    return _step(name, instruction, run, own, (first, 1), *([(SCC, 1)] if name == "s_addk_i32" else []))


def _sixteen(operand: object, instruction: Instruction, *, extend: bool) -> int:
    """A constant of SOPK's 16 bits as a register holds it."""
    if not isinstance(operand, Constant) or isinstance(operand.value, float):
        raise unknown(instruction, "the second operand must be an integer")
    if not (-(1 << 15) <= operand.value < 1 << 16):
        raise unknown(instruction, f"{operand.value} does not fit 16 bits")
    value = operand.value & 0xFFFF
    return value | 0xFFFF0000 if extend and value >> 15 else value


def _save(name: str, instruction: Instruction) -> Step:
    expect(instruction, 2)
    target, operand = instruction.operands
    first = register(target, instruction, scalar=True, count=2).first
    a = scalar_source(operand, instruction, 64)

    def run(wave: Wave) -> None:
        value, before = a(wave), wave.pair(EXEC)
        wave.set_pair(first, before)
        after = value & before if name == "s_and_saveexec_b64" else value | before
        wave.set_pair(EXEC, after)
        wave.scalars[SCC] = int(after != 0)

    step = _step(name, instruction, run, mask_of(operand) | 3 << EXEC, (first, 2), (EXEC, 2), (SCC, 1))
    refuse, define = step.shade, _shade(0, (first, 2), (SCC, 1))

    def shade(wave: Wave) -> None:
        refuse(wave)
        define(wave)

    step.shade = shade
    return step


def _compare(
    name: str, instruction: Instruction, bits: int, function: Callable[[int, int], bool], *, extend: bool | None = None
) -> Step:
    """``extend`` is for a second operand that is a constant of 16 bits: as `_sixteen` has it."""
    expect(instruction, 2)
    left, right = instruction.operands
    a = scalar_source(left, instruction, bits)
    constant = None if extend is None else _sixteen(right, instruction, extend=extend)
    b = scalar_source(right, instruction, bits) if constant is None else lambda wave: constant

    def run(wave: Wave) -> None:
        wave.scalars[SCC] = int(function(a(wave), b(wave)))

    return _step(name, instruction, run, mask_of(left, right), (SCC, 1))


def _ordered(
    name: str, instruction: Instruction, order: Callable[[int, int], bool], reading: str, *, short: bool
) -> Step:
    read, extend = signed if reading == "i32" else int, reading == "i32" if short else None
    return _compare(name, instruction, int(reading[1:]), lambda a, b: order(read(a), read(b)), extend=extend)
