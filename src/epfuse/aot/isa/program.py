"""Assembly as Triton's AMD backend emits it, read strictly: what is not known is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from epfuse.aot.isa.errors import UnknownInstruction
from epfuse.aot.isa.registers import FILES, NAMED, Register


@dataclass(frozen=True)
class Constant:
    """A number in an instruction: an integer, or a float that the encoding has a code for."""

    value: int | float


@dataclass(frozen=True)
class Label:
    """Where a branch goes."""

    name: str


@dataclass(frozen=True)
class Off:
    """``off``: no scalar address."""


Operand = Register | Constant | Label | Off
Modifier = int | str | bool | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction: the same one only if it is the same object, so that what it decodes to can be kept by it.

    Attributes:
        opcode: with the encoding's suffix.
        operands: in the order of the assembly.
        modifiers: by name; True for one without a value.
        line: of the assembly, from 1.
        text: the line itself.
    """

    opcode: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, Modifier]
    line: int
    text: str


@dataclass(frozen=True)
class Argument:
    """One kernel argument.

    Attributes:
        offset, size: bytes in the kernarg segment.
        kind: "global_buffer" or "by_value".
    """

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        name: the kernel's.
        instructions: in order.
        labels: name -> index of the instruction that follows.
        directives: ``.amdhsa_*`` without that prefix.
        arguments: the kernarg segment, Triton's two scratch pointers at its end.
        kernarg_bytes: size of the kernarg segment.
        lds_bytes: what the code object itself asks for; Triton adds the rest at the launch.
        vgprs, agprs, sgprs: registers that the code object asks for.
        threads: most threads of a workgroup.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    directives: dict[str, int]
    arguments: tuple[Argument, ...]
    kernarg_bytes: int
    lds_bytes: int
    vgprs: int
    agprs: int
    sgprs: int
    threads: int

    def without(self, index: int) -> Program:
        """The program with instruction ``index`` in the place of an ``s_nop 0``: a fault that a gate must find."""
        nop = replace(self.instructions[index], opcode="s_nop", operands=(Constant(0),), modifiers={})
        return replace(self, instructions=(*self.instructions[:index], nop, *self.instructions[index + 1 :]))


TARGET = "amdgcn-amd-amdhsa--gfx942"
_DIRECTIVE = re.compile(r"\.amdhsa_(\w+)\s+(\d+)$")
_LABEL = re.compile(r"([.\w$]+):$")
_OPCODE = re.compile(r"([a-z]\w*)(?:\s+(.*))?$")
_RANGE = re.compile(r"([sva])\[(\d+):(\d+)\]$")
_SINGLE = re.compile(r"([sva])(\d+)$")
_INTEGER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)$")
_FLOAT = re.compile(r"-?\d+\.\d+$")
_FLOATS = (0.5, 1.0, 2.0, 4.0)
_MODIFIER = re.compile(r"([a-z]\w*)(?::(.+)|\((\d+)\))?$")
_VALUES = re.compile(r"-?(?:0x[0-9a-f]+|\d+)$|[A-Z][A-Z_0-9]*$|swizzle\([A-Z]\w*(?:,[0-9]+)*\)$")
_LIST = re.compile(r"\[(\d+(?:,\d+)*)\]$")
# what may stand between a kernel's instructions and says nothing about their meaning
_SILENT = (".loc", ".file", ".cfi_startproc", ".cfi_endproc", ".cfi_sections", ".p2align")


def parse(text: str) -> Program:
    """Read one kernel.

    Raises:
        UnknownInstruction: the line has something that is not known, or the text is not one gfx942 kernel.
    """
    lines = [_without_comment(line) for line in text.splitlines()]
    if f'.amdgcn_target "{TARGET}"' not in lines:
        raise UnknownInstruction(f"the assembly's .amdgcn_target must be {TARGET}")
    kernels = [line.split()[1] for line in lines if line.startswith(".amdhsa_kernel ")]
    if len(kernels) != 1:
        raise UnknownInstruction(f"the assembly holds {len(kernels)} kernels; it must hold one")
    [name] = kernels
    instructions, labels = _body(name, lines)
    directives = {match[1]: int(match[2]) for line in lines if (match := _DIRECTIVE.match(line))}
    arguments, metadata = _fields(text)
    return Program(
        name=name,
        instructions=tuple(instructions),
        labels=labels,
        directives=directives,
        arguments=tuple(arguments),
        kernarg_bytes=metadata["kernarg_segment_size"],
        lds_bytes=metadata["group_segment_fixed_size"],
        vgprs=directives["accum_offset"] if metadata["agpr_count"] else directives["next_free_vgpr"],
        agprs=metadata["agpr_count"],
        sgprs=directives["next_free_sgpr"],
        threads=metadata["max_flat_workgroup_size"],
    )


def _without_comment(line: str) -> str:
    return line.split(";", 1)[0].strip()


def _fields(text: str) -> tuple[list[Argument], dict[str, int]]:
    """The kernel's arguments and the numbers of its metadata."""
    found = re.search(r"^\s*\.amdgpu_metadata\n(.*?)^\s*\.end_amdgpu_metadata", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise UnknownInstruction("the assembly has no .amdgpu_metadata")
    arguments = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)$", found[1], re.MULTILINE)
    if found[1].count(".value_kind:") != len(arguments):
        raise UnknownInstruction("the metadata has an argument with more than an offset, a size and a kind")
    numbers = {name: int(value) for name, value in re.findall(r"^[\s-]*\.(\w+):\s+(\d+)$", found[1], re.MULTILINE)}
    return [Argument(int(offset), int(size), kind) for offset, size, kind in arguments], numbers


def _body(name: str, lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    if f"{name}:" not in lines:
        raise UnknownInstruction(f"the assembly has no label {name}")
    for number, line in enumerate(lines[lines.index(f"{name}:") :], lines.index(f"{name}:") + 1):
        if line.startswith(".section"):
            return instructions, labels
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif line and line.split()[0] not in _SILENT:
            instructions.append(_instruction(line, number))
    raise UnknownInstruction(f"the code of {name} does not end in another section")


def _instruction(line: str, number: int) -> Instruction:
    match = _OPCODE.match(line)
    if match is None:
        raise UnknownInstruction(f"{line!r} is no instruction and no directive that may stand here", number)
    opcode, rest = match[1], match[2] or ""
    chunks = _split(rest, ",") if rest else []
    words = _split(chunks[-1], " ") if chunks else []
    waits = opcode == "s_waitcnt"
    operands = [] if waits else [*chunks[:-1], *words[:1]]
    modifiers: dict[str, Modifier] = {}
    for word in words if waits else words[1:]:
        key, value = _modifier(word, number)
        if key in modifiers:
            raise UnknownInstruction(f"{key} stands twice in {line!r}", number)
        modifiers[key] = value
    return Instruction(opcode, tuple(_operand(each, number) for each in operands), modifiers, number, line)


def _split(text: str, at: str) -> list[str]:
    """Split outside of brackets; empty parts are left out."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == at and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _modifier(word: str, line: int) -> tuple[str, Modifier]:
    match = _MODIFIER.match(word)
    if match is None:
        raise UnknownInstruction(f"{word!r} is no modifier", line)
    name, value, count = match.groups()
    if count is not None:
        return name, int(count)
    if value is None:
        return name, True
    if numbers := _LIST.match(value):
        return name, tuple(int(each) for each in numbers[1].split(","))
    if not _VALUES.match(value):
        raise UnknownInstruction(f"{value!r} is no value of {name}", line)
    return name, int(value, 0) if _INTEGER.match(value) else value


def _operand(text: str, line: int) -> Operand:
    negate = absolute = extend = False
    inner = text
    if inner.startswith("-") and not _INTEGER.match(inner) and not _FLOAT.match(inner):
        negate, inner = True, inner[1:]
    if inner.startswith("|") and inner.endswith("|"):
        absolute, inner = True, inner[1:-1]
    if inner.startswith("sext(") and inner.endswith(")"):
        extend, inner = True, inner[5:-1]
    register = _register(inner)
    if register is not None:
        return replace(register, negate=negate, absolute=absolute, extend=extend)
    if not (negate or absolute or extend):
        if _INTEGER.match(inner):
            return Constant(int(inner, 0))
        if _FLOAT.match(inner) and abs(float(inner)) in _FLOATS:
            return Constant(float(inner))
        if inner == "off":
            return Off()
        if inner.startswith(".L"):
            return Label(inner)
    raise UnknownInstruction(f"{text!r} is no operand", line)


def _register(text: str) -> Register | None:
    if text in NAMED:
        return Register(*NAMED[text])
    if match := _SINGLE.match(text):
        first = last = int(match[2])
    elif match := _RANGE.match(text):
        first, last = int(match[2]), int(match[3])
    else:
        return None
    base, size = FILES[match[1]]
    if not first <= last < size:
        return None
    return Register(base + first, last - first + 1)
