"""A kernel's arguments, as its code object's metadata lays them out."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from epfuse.aot.isa.errors import ExecutionError
from epfuse.aot.isa.program import Program

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
"""Triton's types of scalars."""
SCRATCH_POINTERS = 2
"""Triton's, behind the kernel's own arguments: global and profile scratch. Null: our kernels use neither."""


def flatten(types: Sequence[Any], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Type and value of each run-time argument, tuples unpacked, constants left out; tensors as they are."""
    flat: list[tuple[str, Any]] = []
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            flat += flatten(kind, value)
        elif kind != "constexpr":
            flat.append((kind, value))
    return flat


def kernarg(
    program: Program,
    values: Sequence[tuple[str, Any]],
    grid: tuple[int, int, int],
    threads: int,
    lds_bytes: int,
) -> bytes:
    """The kernarg segment of a launch.

    Args:
        program: its metadata says what lies where.
        values: Triton's type and the value of each run-time argument; of a pointer the address.
        grid: workgroups.
        threads: of a workgroup.
        lds_bytes: that the launch asks for.

    Raises:
        ExecutionError: the metadata has other arguments than the launch, or one of a kind that is not known.
    """
    hidden = {
        "hidden_block_count_x": grid[0],
        "hidden_block_count_y": grid[1],
        "hidden_block_count_z": grid[2],
        "hidden_group_size_x": threads,
        "hidden_group_size_y": 1,
        "hidden_group_size_z": 1,
        "hidden_remainder_x": 0,
        "hidden_remainder_y": 0,
        "hidden_remainder_z": 0,
        "hidden_global_offset_x": 0,
        "hidden_global_offset_y": 0,
        "hidden_global_offset_z": 0,
        "hidden_grid_dims": 3,
        "hidden_dynamic_lds_size": lds_bytes,
    }
    own = [*(_packed(*value) for value in values), *[bytes(8)] * SCRATCH_POINTERS]
    segment = bytearray(program.kernarg_bytes)
    for argument in program.arguments:
        if argument.kind in ("global_buffer", "by_value"):
            if not own:
                raise ExecutionError(f"{program.name} takes more arguments than the launch has")
            data = own.pop(0)
        elif argument.kind in hidden:
            data = hidden[argument.kind].to_bytes(argument.size, "little")
        else:
            raise ExecutionError(f"{program.name} takes an argument of kind {argument.kind}, which is not known")
        if len(data) != argument.size:
            raise ExecutionError(
                f"{program.name} takes {argument.size} bytes at {argument.offset}; the launch has {len(data)}"
            )
        segment[argument.offset : argument.offset + argument.size] = data
    if own:
        raise ExecutionError(f"the launch has {len(own)} arguments more than {program.name} takes")
    return bytes(segment)


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value)
    if kind not in _FORMATS:
        raise ExecutionError(f"an argument has Triton's type {kind}; the ISA model packs none such")
    return struct.pack("<" + _FORMATS[kind], value)
