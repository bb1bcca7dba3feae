"""Every error that epfuse raises on purpose; each names the argument, what it got and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class EpfuseError(ValueError):
    """Base class: catch this to catch everything that epfuse refuses.

    Fix: what the message says; the kinds below say more.
    """


class ShapeError(EpfuseError):
    """A tensor's shape does not fit the layer or the other arguments.

    Fix: compare the sizes that the message names; DESIGN.md says what the letters of sizes mean.
    """


class DtypeError(EpfuseError):
    """A tensor's dtype is not one that the path takes.

    Fix: convert the tensor to a dtype that the message lists, or choose the path that takes it.
    """


class DeviceError(EpfuseError):
    """Tensors of one call live on different devices.

    Fix: move all tensors of the call to the device of ``hidden``.
    """


class LayoutError(EpfuseError):
    """A tensor is not contiguous where the kernels need it to be.

    Fix: pass ``tensor.contiguous()``.
    """


class ConfigError(EpfuseError):
    """A parameter's value is out of range or makes no sense.

    Fix: give a value within the bounds that the message names.
    """


class ExpertMapError(EpfuseError):
    """An expert map is not an injective map onto 0..L-1 with -1 elsewhere.

    Fix: build it with `ExpertMap.contiguous`, or number the local experts 0..L-1; a 0/1 ownership mask is no map.
    """


class UnsupportedTarget(EpfuseError):
    """The device can't run what was asked; the message names what it can run.

    Fix: choose a path, format or GPU that the message lists; ``epfuse plan`` says which run where.
    """


class MissingDependency(EpfuseError):
    """An optional dependency is not installed; the message names the extra that brings it.

    Fix: install the extra that the message names.
    """


class CheckpointError(EpfuseError):
    """A checkpoint's file can't be read or written, or holds another model's tensors; the message names both.

    Fix: give the folder of the model that the message expects, whole and as its publisher wrote it.
    """


class TraceError(EpfuseError):
    """A profiler's trace can't be read, or has nothing to profile; the message names the file.

    Fix: record it again with the profiler on while the server works (docs/profiling.md).
    """


class CompilerDied(EpfuseError):
    """A process that compiles was ended by something else, such as the kernel where memory is short.

    Fix: free memory, or compile with fewer processes; what is compiled already is kept.
    """


class NotCompiled(EpfuseError):
    """A kernel is not compiled, and may not be compiled any more (EPFUSE_NO_COMPILE=1).

    Fix: run ``epfuse warmup`` for this layer and GPU and set EPFUSE_KERNELS, or unset EPFUSE_NO_COMPILE.
    """


class TuningError(EpfuseError):
    """A search for tiles can't be trusted or can't go on; the message says why.

    Fix: leave the GPU to the search alone and start it again: it goes on where it stopped.
    """


def first_fault(error: ValidationError, whole: str) -> tuple[str, str]:
    """Where and what the first thing is that pydantic complains of; ``whole`` where it is the input as such."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) for part in first["loc"]) or whole, first["msg"]
