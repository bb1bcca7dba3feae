"""Vector instructions decoded: operands, SDWA, DPP, and what is left of VALU beside `valu`'s table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epfuse.aot.isa import lanes, masks, pairs, shadows
from epfuse.aot.isa.operands import Source, Value, expect, mask_of, register, unknown, vector_source
from epfuse.aot.isa.program import Instruction, Operand
from epfuse.aot.isa.registers import ACCUMULATORS, EXEC, Register
from epfuse.aot.isa.registers import VECTORS as VECTORS_BEGIN
from epfuse.aot.isa.valu import VECTORS, Vector
from epfuse.aot.isa.wave import Step, Wave

SUFFIXES = ("_e32", "_e64", "_dpp", "_sdwa")
SDWA = ("dst_sel", "dst_unused", "src0_sel", "src1_sel")
TARGETS = {"BYTE_0": 0, "BYTE_1": 8, "BYTE_2": 16, "BYTE_3": 24, "WORD_0": 0, "WORD_1": 16}


def bare(opcode: str) -> tuple[str, str]:
    """An opcode without the encoding's suffix, and the suffix."""
    for suffix in SUFFIXES:
        if opcode.endswith(suffix):
            return opcode.removesuffix(suffix), suffix
    return opcode, ""


def decode(name: str, suffix: str, instruction: Instruction) -> Step | None:
    """A step of vector arithmetic; None if ``name`` is none."""
    if name in VECTORS:
        return _vector(name, suffix, VECTORS[name], instruction)
    return (
        masks.decode(name, suffix, instruction)
        or pairs.decode(name, suffix, instruction)
        or lanes.decode(name, suffix, instruction)
    )


def _vector(name: str, suffix: str, vector: Vector, instruction: Instruction) -> Step:
    allowed = {"_sdwa": SDWA, "_dpp": lanes.MODIFIERS}.get(suffix, ())
    expect(instruction, vector.sources + 1, *allowed, *(["clamp"] if vector.clamps and suffix == "_e64" else []))
    target, *operands = instruction.operands
    row = register(target, instruction, scalar=False).row
    accumulates = _accumulator_sides(name, instruction)
    if not accumulates and any(
        isinstance(each, Register) and each.first >= ACCUMULATORS for each in instruction.operands
    ):
        raise unknown(instruction, "an accumulation register where only v_accvgpr_* has one")
    selections = [instruction.modifiers.get(f"src{place}_sel", "DWORD") for place in range(len(operands))]
    if suffix == "_sdwa" and "dst_sel" not in instruction.modifiers:
        raise unknown(instruction, "an SDWA instruction without dst_sel")
    sources = tuple(
        vector_source(operand, instruction, floating=vector.floating, select=str(select))
        for operand, select in zip(operands, selections, strict=True)
    )
    function = vector.function
    if "clamp" in instruction.modifiers:
        assert vector.clamps is not None
        function = vector.clamps
    if vector.keeps:
        operands, sources = [*operands, target], (*sources, vector_source(target, instruction))
    if suffix == "_dpp":
        return lanes.permuted(name, instruction, row, sources, function, tuple(operands))
    write = _writer(instruction, row)
    reads = mask_of(*operands) | 3 << EXEC
    shade = _shade_of(name, vector, row, tuple(operands), sources, plain=suffix != "_sdwa")
    facts = {"transcendental": 1} if vector.transcendental else {}
    if instruction.modifiers.get("dst_sel", "DWORD") != "DWORD":
        facts["part"] = 1
    return Step(
        instruction,
        name,
        "valu",
        _runner(write, function, sources),
        reads,
        1 << (row + VECTORS_BEGIN),
        shade,
        facts=facts,
    )


def _accumulator_sides(name: str, instruction: Instruction) -> bool:
    """Whether it is one of the instructions between the two files, and has its operands in the right ones."""
    if not name.startswith("v_accvgpr"):
        return False
    sides = {
        "v_accvgpr_read_b32": (False, True),
        "v_accvgpr_write_b32": (True, False),
        "v_accvgpr_mov_b32": (True, True),
    }
    for operand, wanted in zip(instruction.operands, sides[name], strict=True):
        if (isinstance(operand, Register) and operand.first >= ACCUMULATORS) is not wanted:
            raise unknown(instruction, f"{operand} is in the wrong register file")
    return True


def _runner(
    write: Callable[[Wave, Value], None], function: Callable[..., Value], sources: tuple[Source, ...]
) -> Callable[[Wave], None]:
    if len(sources) == 1:
        [a] = sources
        return lambda wave: write(wave, function(a(wave)))
    if len(sources) == 2:
        a, b = sources
        return lambda wave: write(wave, function(a(wave), b(wave)))
    return lambda wave: write(wave, function(*[source(wave) for source in sources]))


def _writer(instruction: Instruction, row: int) -> Callable[[Wave, Value], None]:
    select = instruction.modifiers.get("dst_sel", "DWORD")
    if select == "DWORD":
        return lambda wave, value: wave.write(row, value)
    if select not in TARGETS or instruction.modifiers.get("dst_unused") != "UNUSED_PAD":
        raise unknown(instruction, "only dst_sel of a byte or a word, padded with zeros, is known")
    part = np.uint32(0xFF if str(select).startswith("BYTE") else 0xFFFF)
    shift = np.uint32(TARGETS[str(select)])
    return lambda wave, value: wave.write(row, (value & part) << shift)


def _shade_of(
    name: str, vector: Vector, row: int, operands: tuple[Operand, ...], sources: tuple[Source, ...], *, plain: bool
) -> shadows.Shade:
    if plain and name in ("v_and_b32", "v_or_b32"):
        return shadows.masked(row, operands, sources, neutral=name == "v_and_b32")
    if plain and vector.controls is not None:
        return shadows.moved(row, operands, sources, vector.function, vector.controls)
    return shadows.computed(range(row, row + 1), operands)
