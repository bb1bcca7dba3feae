"""Vector memory: buffers by descriptor, and global addresses; and scalar loads."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.errors import AccessError, IsaError
from epfuse.aot.isa.hazards import PendingAccess
from epfuse.aot.isa.lds import bytes_at, put, put_bytes, take
from epfuse.aot.isa.memory import BASE
from epfuse.aot.isa.operands import expect, mask_of, register, scalar_source, unknown
from epfuse.aot.isa.program import Constant, Instruction, Off, Operand
from epfuse.aot.isa.registers import EXEC, VECTORS
from epfuse.aot.isa.wave import Step, Wave, refuse_undefined

_NAME = re.compile(r"(buffer|global)_(load|store)_(ubyte|sbyte|byte|ushort|sshort|short|dword|dwordx[234])$")
_SIZES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
NO_WAVE = -(1 << 30)
"""Scalar loads see nothing that was written in the launch: their cache is not told."""
LINE = 7
"""log2 of a cache line's bytes."""
FORMAT = 0x27000
"""The last word of a descriptor of raw 32-bit data, the only one that is known."""
Places = NDArray[np.int64]
CACHE_HINTS = ("sc0", "sc1", "nt")
"""Modifiers of loads and stores that say where to cache, not what is computed."""


def decode(name: str, instruction: Instruction) -> Step | None:
    """A step of a memory instruction; None if ``name`` is none."""
    if name.startswith("s_load_dword"):
        return _scalar_load(name, instruction)
    if name in ("buffer_atomic_add_f32", "global_atomic_add_f32"):
        return _access(name, instruction, name.partition("_")[0], "add", "dword")
    match = _NAME.match(name)
    narrow = {"load": ("ubyte", "sbyte", "ushort", "sshort"), "store": ("byte", "short")}
    if match is None or not (match[3] in narrow[match[2]] or match[3].startswith("dword")):
        return None
    return _access(name, instruction, match[1], match[2], match[3])


def _access(name: str, instruction: Instruction, space: str, way: str, width: str) -> Step:
    size = _SIZES.get(width) or 4 * int(width[-1])
    count = max(size // 4, 1)
    hints = () if way == "add" else CACHE_HINTS
    loads = way == "load"
    if space == "buffer":
        expect(instruction, 4, "offen", "offset", *hints)
        value, pointer, *rest = instruction.operands
        places, pointers = _buffer_places(instruction, pointer, rest, size)
    else:
        expect(instruction, 3, "offset", *hints)
        value, pointer = instruction.operands[:2]
        if not loads:
            pointer, value = value, pointer
        places, pointers = _global_places(instruction, pointer, instruction.operands[2], size)
    data = register(value, instruction, scalar=False, count=count)
    kind = {"load": "read", "store": "write", "add": "add"}[way]
    move = {"load": _load, "store": _store, "add": _add}[way]
    extend = width.startswith("s")

    def run(wave: Wave) -> None:
        where, inside = places(wave)
        memory, group = wave.group.memory, wave.group
        kept = where if inside is None else where[inside]
        settle: Callable[[], None] | None = None
        if kept.size:
            written = _taken(wave, data.row, inside, size) if way == "store" else None
            try:
                owner = group.number << 8 | wave.number
                grains = memory.touch(kind, owner, group.number, kept, size, instruction.line, written)
            except IsaError as error:
                raise type(error)(f"{error}: {instruction.text}") from None
            if way == "store":
                settle = lambda: group.stored(grains)  # noqa: E731
            _count(wave, kept, size, loads)
        move(wave, data.row, where, inside, size, extend)
        wave.waits.ask(PendingAccess(data.mask if loads else 0, instruction.line, settle=settle), vector=True)

    refuse = refuse_undefined(pointers, instruction, "an address")

    def shade(wave: Wave) -> None:
        # lanes that are not active may hold anything
        active = wave.active()
        for number in range(VECTORS, pointers.bit_length()):
            if pointers >> number & 1 and wave.shadows[number - VECTORS][active].any():
                refuse(wave)
        if wave.undefined & pointers & ((1 << VECTORS) - 1):
            refuse(wave)

    reads = pointers | 3 << EXEC | (0 if loads else data.mask)
    facts = {"bytes": size}
    if way == "store" and size > 8 and _creates_hazard(instruction, space):
        facts["stored"] = data.mask
    return Step(instruction, name, "vmem", run, reads, data.mask if loads else 0, shade, facts=facts)


def _creates_hazard(instruction: Instruction, space: str) -> bool:
    """A buffer store whose scalar offset is a register does not."""
    return space == "global" or isinstance(instruction.operands[3], Constant)


def _offset(instruction: Instruction, least: int, most: int) -> int:
    value = instruction.modifiers.get("offset", 0)
    if not isinstance(value, int) or value is True or not least <= value <= most:
        raise unknown(instruction, f"offset must be {least} to {most}")
    return value


PlacesOf = Callable[[Wave], tuple[Places, NDArray[np.bool_] | None]]


def _buffer_places(instruction: Instruction, pointer: Operand, rest: list[Operand], size: int) -> tuple[PlacesOf, int]:
    """Where a buffer instruction goes: one byte place for each active lane, and which of them are in range."""
    if instruction.modifiers.get("offen") is not True:
        raise unknown(instruction, "a buffer instruction without offen is not known")
    offset = _offset(instruction, 0, 4095)
    row = register(pointer, instruction, scalar=False).row
    first = register(rest[0], instruction, scalar=True, count=4).first
    more = scalar_source(rest[1], instruction)

    def places(wave: Wave) -> tuple[Places, NDArray[np.bool_] | None]:
        words = wave.scalars[first : first + 4]
        if words[1] >> 16 or words[3] != FORMAT:
            raise AccessError(
                f"a descriptor with a stride or another format, {[hex(word) for word in words]}: {instruction.text}",
                instruction.line,
            )
        base, records, extra = words[0] | words[1] << 32, words[2], more(wave)
        lanes = wave.rows[row] if wave.lanes is None else wave.rows[row][wave.lanes]
        offsets = lanes.astype(np.int64) + offset
        if offset and (offsets >> 32).any():
            raise AccessError(
                f"an offset beyond 32 bits, whose range is not known: {instruction.text}", instruction.line
            )
        # range checking leaves the scalar offset out of the offset and takes it from the records
        inside = offsets < records - extra
        partly = inside & (offsets + size > records - extra)
        if partly.any():
            raise AccessError(f"an access across the end of a descriptor's range: {instruction.text}", instruction.line)
        where = offsets + (base + extra - BASE)
        everything = bool(inside.all())
        _check(wave, where if everything else where[inside], size, instruction)
        return where, None if everything else inside

    return places, mask_of(pointer, rest[0], rest[1])


def _global_places(instruction: Instruction, pointer: Operand, scalar: Operand, size: int) -> tuple[PlacesOf, int]:
    offset = _offset(instruction, -4096, 4095)
    if isinstance(scalar, Off):
        row = register(pointer, instruction, scalar=False, count=2).row
        base = None
    else:
        row = register(pointer, instruction, scalar=False).row
        base = register(scalar, instruction, scalar=True, count=2).first

    def places(wave: Wave) -> tuple[Places, NDArray[np.bool_] | None]:
        low = wave.rows[row].astype(np.int64)
        where = low + wave.pair(base) if base is not None else low | wave.rows[row + 1].astype(np.int64) << 32
        where = where + (offset - BASE)
        if wave.lanes is not None:
            where = where[wave.lanes]
        _check(wave, where, size, instruction)
        return where, None

    return places, mask_of(pointer, scalar)


def _check(wave: Wave, where: Places, size: int, instruction: Instruction) -> None:
    """Every access must lie in a buffer, at a multiple of its size or of four bytes."""
    if not where.size:
        return
    unit = min(size, 4)
    if (where & (unit - 1)).any():
        raise AccessError(f"an address is not a multiple of {unit}: {instruction.text}", instruction.line)
    memory = wave.group.memory
    first, last = int(where.min()) + BASE, int(where.max()) + BASE
    buffer = memory.buffer_of(first)
    if buffer is not None and last + size <= buffer.end:
        return
    try:
        for place in where.tolist():
            memory.check(place + BASE, place + BASE + size)
    except AccessError as error:
        raise AccessError(f"{error}: {instruction.text}", instruction.line) from None


def _count(wave: Wave, places: Places, size: int, loads: bool) -> None:
    counts, memory = wave.group.counts, wave.group.memory
    buffer = memory.buffer_of(int(places[0]) + BASE)
    name = "?" if buffer is None else buffer.name
    lines = len(set((places >> LINE).tolist()))
    (counts.loaded if loads else counts.stored)[name] += size * len(places)
    (counts.lines_loaded if loads else counts.lines_stored)[name] += lines


def _load(wave: Wave, first: int, where: Places, inside: NDArray[np.bool_] | None, size: int, extend: bool) -> None:
    """Out of range is 0."""
    memory = wave.group.memory
    kept = where if inside is None else np.where(inside, where, 0)
    for word in range(max(size // 4, 1)):
        if size < 4:
            value, shadow = (bytes_at(kind, kept, size, extend) for kind in (memory.data, memory.undefined))
        else:
            value = memory.data.view(np.uint32)[(kept >> 2) + word]
            shadow = memory.undefined.view(np.uint32)[(kept >> 2) + word]
        if inside is not None:
            value, shadow = np.where(inside, value, np.uint32(0)), np.where(inside, shadow, np.uint32(0))
        put(wave, first + word, value, shadow)


def _taken(wave: Wave, first: int, inside: NDArray[np.bool_] | None, size: int) -> NDArray[np.uint8]:
    """The bytes that each lane stores, [lanes, size]."""
    words = np.stack([take(wave, first + word)[0] for word in range(max(size // 4, 1))], axis=1)
    raw = words.view(np.uint8).reshape(len(words), -1)[:, :size]
    return raw if inside is None else raw[inside]


def _store(wave: Wave, first: int, where: Places, inside: NDArray[np.bool_] | None, size: int, extend: bool) -> None:
    memory = wave.group.memory
    for word in range(max(size // 4, 1)):
        value, shadow = take(wave, first + word)
        kept = where
        if inside is not None:
            value, shadow, kept = value[inside], shadow[inside], where[inside]
        if size < 4:
            put_bytes(memory.data, kept, size, value)
            put_bytes(memory.undefined, kept, size, shadow)
        else:
            memory.data.view(np.uint32)[(kept >> 2) + word] = value
            memory.undefined.view(np.uint32)[(kept >> 2) + word] = shadow


def _add(wave: Wave, first: int, where: Places, inside: NDArray[np.bool_] | None, size: int, extend: bool) -> None:
    """Lane after lane; the hardware's order is not known."""
    memory = wave.group.memory
    value, shadow = take(wave, first)
    kept = where
    if inside is not None:
        value, shadow, kept = value[inside], shadow[inside], where[inside]
    np.add.at(memory.data.view(np.float32), kept >> 2, value.view(np.float32))
    np.bitwise_or.at(
        memory.undefined.view(np.uint32), kept >> 2, np.where(shadow != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    )


def _scalar_load(name: str, instruction: Instruction) -> Step:
    suffix = name.removeprefix("s_load_dword").removeprefix("x") or "1"
    if suffix not in ("1", "2", "4", "8", "16"):
        raise unknown(instruction, "the scalar load is not known")
    count = int(suffix)
    expect(instruction, 3)
    target, pointer, offset = instruction.operands
    first = register(target, instruction, scalar=True, count=count).first
    base = register(pointer, instruction, scalar=True, count=2).first
    more = scalar_source(offset, instruction)
    signed = isinstance(offset, Constant)

    def run(wave: Wave) -> None:
        memory, group = wave.group.memory, wave.group
        add = more(wave)
        address = wave.pair(base) + (add - (1 << 32) if signed and add >> 31 else add)
        if address & 3:
            raise AccessError(f"an address is not a multiple of 4: {instruction.text}", instruction.line)
        try:
            memory.check(address, address + 4 * count)
        except AccessError as error:
            raise AccessError(f"{error}: {instruction.text}", instruction.line) from None
        place = address - BASE
        memory.touch("read", NO_WAVE, NO_WAVE, np.arange(place, place + 4 * count, 4), 4, instruction.line)
        data, undefined = (
            array[place : place + 4 * count].view(np.uint32).tolist() for array in (memory.data, memory.undefined)
        )
        for number in range(count):
            wave.scalars[first + number] = data[number]
            wave.shade_scalar(first + number, undefined[number])
        buffer = memory.buffer_of(address)
        group.counts.loaded["?" if buffer is None else buffer.name] += 4 * count
        wave.waits.ask(PendingAccess(((1 << count) - 1) << first, instruction.line, scalar=True), vector=False)

    reads = mask_of(pointer, offset)
    refuse = refuse_undefined(reads, instruction, "an address")
    return Step(instruction, name, "smem", run, reads, ((1 << count) - 1) << first, refuse)
