"""LDS instructions: reads, writes, additions, and moves between lanes that go through its crossbar."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from epfuse.aot.isa.errors import AccessError
from epfuse.aot.isa.hazards import PendingAccess
from epfuse.aot.isa.operands import expect, register, unknown
from epfuse.aot.isa.program import Instruction
from epfuse.aot.isa.registers import EXEC, LANES, VECTORS, Register
from epfuse.aot.isa.wave import Step, Wave, refuse_undefined

BANKS = 32
_WIDE_READS = ((0, 20), (4, 16), (8, 28), (12, 24))
"""Where the two fours of lanes begin that LDS serves together, in each half of a wave."""
_NAME = re.compile(r"ds_(read|write)(2st64|2)?_(b8|b16|b32|b64|b96|b128|u8|u16|i8|i16)$")
_SWIZZLE = re.compile(r"swizzle\((SWAP|QUAD_PERM),([0-9,]+)\)$")


def decode(name: str, instruction: Instruction) -> Step | None:
    """A step of an LDS instruction; None if ``name`` is none."""
    if match := _NAME.match(name):
        way, two, width = match.groups()
        if (way == "write" or two or width not in ("b8", "b16")) and not (way == "write" and width[0] != "b"):
            return _access(name, instruction, way, two, width)
    if name == "ds_add_u32":
        return _add(name, instruction)
    if name == "ds_bpermute_b32":
        return _permute(name, instruction)
    if name == "ds_swizzle_b32":
        return _swizzle(name, instruction)
    return None


def _number(instruction: Instruction, name: str, most: int) -> int:
    value = instruction.modifiers.get(name, 0)
    if not isinstance(value, int) or value is True or not 0 <= value <= most:
        raise unknown(instruction, f"{name} must be 0 to {most}")
    return value


def _access(name: str, instruction: Instruction, way: str, two: str | None, width: str) -> Step:
    """Reads and writes of one place or of two."""
    size = int(width[1:]) // 8
    step = size * (64 if two == "2st64" else 1)
    reads = way == "read"
    if two:
        expect(instruction, 2 if reads else 3, "offset0", "offset1")
        offsets = [step * _number(instruction, each, 255) for each in ("offset0", "offset1")]
    else:
        expect(instruction, 2, "offset")
        offsets = [_number(instruction, "offset", 65535)]
    count = max(size // 4, 1)
    if reads:
        target, pointer = instruction.operands
        data = [register(target, instruction, scalar=False, count=count * len(offsets)).row]
        data = [data[0] + count * place for place in range(len(offsets))]
    else:
        pointer, *values = instruction.operands
        data = [register(each, instruction, scalar=False, count=count).row for each in values]
    address = register(pointer, instruction, scalar=False)
    registers = 0
    for first in data:
        registers |= ((1 << count) - 1) << (first + VECTORS)
    touch = _read if reads else _write
    extend = width[0] == "i"

    def run(wave: Wave) -> None:
        # a load may overwrite its own address
        places = [_places(wave, address.row, offset, size, instruction) for offset in offsets]
        tickets = [
            touch(wave, first, where, size, extend, instruction, name)
            for first, where in zip(data, places, strict=True)
        ]
        group = wave.group

        def settle() -> None:
            for ticket in tickets:
                group.done(ticket)

        wave.waits.ask(PendingAccess(registers if reads else 0, instruction.line, settle=settle), vector=False)

    refuse = refuse_undefined(address.mask, instruction, "an LDS address")
    pointer_reads = address.mask | 3 << EXEC
    return Step(
        instruction,
        name,
        "lds",
        run,
        pointer_reads | (0 if reads else registers),
        registers if reads else 0,
        refuse,
        facts={"bytes": size},
    )


def _places(wave: Wave, row: int, offset: int, size: int, instruction: Instruction) -> NDArray[np.int64]:
    """First bytes, one for each active lane."""
    pointers = wave.rows[row] if wave.lanes is None else wave.rows[row][wave.lanes]
    found = pointers.astype(np.int64) + offset
    unit = min(size, 4)
    if (found & (unit - 1)).any():
        raise AccessError(f"an LDS address is not a multiple of {unit}: {instruction.text}", instruction.line)
    return found


def _count(wave: Wave, name: str, places: NDArray[np.int64], size: int) -> None:
    """Passes that LDS needs if 32 banks of four bytes serve one word each in a pass."""
    lanes = b"" if wave.lanes is None else wave.lanes.tobytes()
    passes, least = _passes(places.tobytes(), lanes, size, "read" in name)
    wave.group.counts.lds_accesses[name] += least
    wave.group.counts.lds_conflicts[name] += passes - least


@cache
def _groups(size: int, reads: bool) -> tuple[NDArray[np.int64], ...]:
    """Lanes that LDS serves together, in one pass where no two of their words lie in one bank.

    Neighbours, but of 16-byte reads four lanes here and four there: CK-Tile's documentation, "Understanding AMD GPU LDS
    and Bank Conflicts". Of 8-byte accesses we have found no description; they are taken as neighbours.
    """
    if reads and size == 16:
        starts = [(half + first, half + second) for half in (0, 32) for first, second in _WIDE_READS]
        return tuple(np.r_[first : first + 4, second : second + 4] for first, second in starts)
    together = 8 if size > 8 else BANKS // max(size // 4, 1)
    return tuple(np.arange(start, start + together) for start in range(0, LANES, together))


@lru_cache(50_000)
def _passes(places: bytes, lanes: bytes, size: int, reads: bool) -> tuple[int, int]:
    """Passes of one instruction, and how many there would be without conflicts."""
    first = np.full(LANES, -1, np.int64)
    first[np.frombuffer(lanes, np.bool_) if lanes else slice(None)] = np.frombuffer(places, np.int64)
    passes = least = 0
    for group in _groups(size, reads):
        begins = first[group]
        begins = begins[begins >= 0]
        if begins.size:
            touched = (begins[:, None] // 4 + np.arange(max(size // 4, 1))).reshape(-1)
            passes += int(np.bincount(np.unique(touched) % BANKS).max())
            least += 1
    return passes, least


def _read(
    wave: Wave, first: int, places: NDArray[np.int64], size: int, extend: bool, instruction: Instruction, name: str
) -> int:
    group = wave.group
    ticket = group.access("read", wave.number, places, size, instruction.line)
    _count(wave, name, places, size)
    if size < 4:
        value, shadow = (bytes_at(kind, places, size, extend) for kind in (group.data, group.undefined))
        put(wave, first, value, shadow)
        return ticket
    for word in range(size // 4):
        where = (places >> 2) + word
        put(wave, first + word, group.words[where], group.undefined_words[where])
    return ticket


def bytes_at(data: NDArray[np.uint8], places: NDArray[np.int64], size: int, extend: bool) -> NDArray[np.uint32]:
    """The words of 1 or 2 bytes at each place; ``extend`` by their sign."""
    found = np.zeros(len(places), np.uint32)
    for byte in range(size):
        found |= data[places + byte].astype(np.uint32) << np.uint32(8 * byte)
    if extend:
        found = ((found << np.uint32(32 - 8 * size)).view(np.int32) >> np.int32(32 - 8 * size)).view(np.uint32)
    return found


def put_bytes(data: NDArray[np.uint8], places: NDArray[np.int64], size: int, value: NDArray[np.uint32]) -> None:
    """The low 1 or 2 bytes of each value to its place."""
    for byte in range(size):
        data[places + byte] = (value >> np.uint32(8 * byte)).astype(np.uint8)


def put(wave: Wave, row: int, value: NDArray[np.uint32], shadow: NDArray[np.uint32]) -> None:
    """Write what was loaded, one value for each active lane."""
    bit = 1 << (row + VECTORS)
    unsure = bool(shadow.any())
    if wave.lanes is None:
        wave.rows[row][...] = value
        if unsure or wave.undefined & bit:
            wave.shade(row, shadow)
    else:
        wave.rows[row][wave.lanes] = value
        if unsure or wave.undefined & bit:
            spread = np.zeros(LANES, np.uint32)
            spread[wave.lanes] = shadow
            wave.shade(row, spread)


def take(wave: Wave, row: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """What is to be stored and its undefined bits, one for each active lane."""
    value, shadow = wave.rows[row], wave.shadows[row]
    return (value, shadow) if wave.lanes is None else (value[wave.lanes], shadow[wave.lanes])


def _write(
    wave: Wave, first: int, places: NDArray[np.int64], size: int, extend: bool, instruction: Instruction, name: str
) -> int:
    group = wave.group
    taken = [take(wave, first + word) for word in range(max(size // 4, 1))]
    new = np.stack([value for value, _ in taken], axis=1).view(np.uint8)[:, :size]
    ticket = group.access("write", wave.number, places, size, instruction.line, new)
    _count(wave, name, places, size)
    for word, (value, shadow) in enumerate(taken):
        if size >= 4:
            group.words[(places >> 2) + word], group.undefined_words[(places >> 2) + word] = value, shadow
            continue
        put_bytes(group.data, places, size, value)
        put_bytes(group.undefined, places, size, shadow)
    return ticket


def _add(name: str, instruction: Instruction) -> Step:
    expect(instruction, 2, "offset")
    offset = _number(instruction, "offset", 65535)
    address, value = (register(each, instruction, scalar=False) for each in instruction.operands)

    def run(wave: Wave) -> None:
        group = wave.group
        places = _places(wave, address.row, offset, 4, instruction)
        ticket = group.access("add", wave.number, places, 4, instruction.line)
        _count(wave, name, places, 4)
        data, shadow = take(wave, value.row)
        np.add.at(group.words, places >> 2, data)
        np.bitwise_or.at(group.undefined_words, places >> 2, np.where(shadow != 0, np.uint32(0xFFFFFFFF), np.uint32(0)))
        wave.waits.ask(PendingAccess(0, instruction.line, settle=lambda: group.done(ticket)), vector=False)

    refuse = refuse_undefined(address.mask, instruction, "an LDS address")
    return Step(instruction, name, "lds", run, address.mask | value.mask | 3 << EXEC, 0, refuse)


def _permute(name: str, instruction: Instruction) -> Step:
    """Each lane takes the register of the lane that its address, over four, names; 0 if that one is not active."""
    expect(instruction, 3, "offset")
    offset = _number(instruction, "offset", 65535)
    target, address, data = (register(each, instruction, scalar=False) for each in instruction.operands)

    def source(wave: Wave) -> NDArray[np.int64]:
        return (wave.rows[address.row].astype(np.int64) + offset) // 4 % LANES

    step = _moved(name, instruction, target, data.mask | address.mask, data.row, source)
    refuse = refuse_undefined(address.mask, instruction, "which lane is read")

    def shade(wave: Wave) -> None:
        # lanes that are not active may hold anything
        if wave.undefined & address.mask and wave.shadows[address.row][wave.active()].any():
            refuse(wave)

    step.shade = shade
    return step


def _swizzle(name: str, instruction: Instruction) -> Step:
    expect(instruction, 2, "offset")
    target, data = (register(each, instruction, scalar=False) for each in instruction.operands)
    match = _SWIZZLE.match(str(instruction.modifiers.get("offset", "")))
    if match is None:
        raise unknown(instruction, "the swizzle is not known")
    numbers = [int(each) for each in match[2].split(",")]
    lane = np.arange(LANES)
    if match[1] == "SWAP" and len(numbers) == 1 and numbers[0] in (1, 2, 4, 8, 16):
        pattern = lane ^ numbers[0]
    elif match[1] == "QUAD_PERM" and len(numbers) == 4 and max(numbers) < 4:
        pattern = lane // 4 * 4 + np.array(numbers)[lane % 4]
    else:
        raise unknown(instruction, "the swizzle is not known")
    return _moved(name, instruction, target, data.mask, data.row, lambda wave: pattern)


def _moved(
    name: str,
    instruction: Instruction,
    target: Register,
    reads: int,
    row: int,
    source: Callable[[Wave], NDArray[np.int64]],
) -> Step:
    """Lanes take from lanes; it touches no memory, but it returns as LDS does."""

    def run(wave: Wave) -> None:
        places, active = source(wave), wave.active()
        there = active[places]
        value = np.where(there, wave.rows[row][places], np.uint32(0))
        shadow = np.where(there, wave.shadows[row][places], np.uint32(0))
        wave.write(target.row, value)
        wave.shade(target.row, shadow)
        wave.waits.ask(PendingAccess(target.mask, instruction.line), vector=False)

    return Step(instruction, name, "lds", run, reads | 3 << EXEC, target.mask, lambda wave: None)
