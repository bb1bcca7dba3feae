"""What can be wrong with assembly or with its execution."""

from __future__ import annotations

from epfuse.errors import EpfuseError


class IsaError(EpfuseError):
    """The base class; ``line`` is the line of the assembly, from 1, if there is one.

    Fix: none for who runs it: the line and what is wrong with it belong in a bug report.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line


class UnknownInstruction(IsaError):
    """An opcode, operand, modifier or directive that the interpreter does not know; it never guesses.

    Fix: run the gate with the pinned Triton, or teach the interpreter the instruction (src/epfuse/aot/isa).
    """


class HazardError(IsaError):
    """A wait is missing: a register, LDS or memory is used before what was asked for is sure to be there.

    Fix: none for who runs it: it is a bug of the kernel or of the compiler; report it.
    """


class AccessError(IsaError):
    """An address outside every buffer or outside LDS.

    Fix: none for who runs it: it is a bug of the kernel or of its launch; report it.
    """


class UndefinedError(IsaError):
    """Bits that nothing has defined decide an address or a branch.

    Fix: none for who runs it: it is a bug of the kernel; report it.
    """


class ExecutionError(IsaError):
    """A program that does not end, waits at a barrier for a wave that ended, or is launched as it can't be.

    Fix: none for who runs it: it is a bug of the kernel or of its launch; report it.
    """
