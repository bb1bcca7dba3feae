"""Every error that epfuse raises on purpose; each names the argument, what it got and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class EpfuseError(ValueError):
    """Base class: catch this to catch everything that epfuse refuses."""


class ShapeError(EpfuseError):
    """A tensor's shape does not fit the layer or the other arguments."""


class DtypeError(EpfuseError):
    """A tensor's dtype is not one that the path takes."""


class DeviceError(EpfuseError):
    """Tensors of one call live on different devices."""


class LayoutError(EpfuseError):
    """A tensor is not contiguous where the kernels need it to be."""


class ConfigError(EpfuseError):
    """A parameter's value is out of range or makes no sense."""


class ExpertMapError(EpfuseError):
    """An expert map is not an injective map onto 0..L-1 with -1 elsewhere."""


class UnsupportedTarget(EpfuseError):
    """The device can't run what was asked; the message names what it can run."""


class MissingDependency(EpfuseError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class CheckpointError(EpfuseError):
    """A checkpoint's file can't be read or written, or holds another model's tensors; the message names both."""


class TraceError(EpfuseError):
    """A profiler's trace can't be read, or has nothing to profile; the message names the file."""


class CompilerDied(EpfuseError):
    """A process that compiles was ended by something else, such as the kernel where memory is short."""


class NotCompiled(EpfuseError):
    """A kernel is not compiled, and may not be compiled any more (EPFUSE_NO_COMPILE=1)."""


class TuningError(EpfuseError):
    """A search for tiles can't be trusted or can't go on; the message says why."""


def first_fault(error: ValidationError, whole: str) -> tuple[str, str]:
    """Where and what the first thing is that pydantic complains of; ``whole`` where it is the input as such."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) for part in first["loc"]) or whole, first["msg"]
