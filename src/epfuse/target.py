"""The only file that asks which GPU this is."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from epfuse.arguments import checks_enums, shown
from epfuse.errors import DeviceError, UnsupportedTarget


class Target(enum.Enum):
    """A family of devices that share kernels, tiles and a tuned table."""

    CPU = "cpu"
    SM90 = "sm_90"
    """NVIDIA H100, H200."""
    GFX942 = "gfx942"
    """AMD MI300X, MI325X; FP8 is E4M3FNUZ."""
    GFX950 = "gfx950"
    """AMD MI350X, MI355X."""

    @property
    def is_amd(self) -> bool:
        return self in (Target.GFX942, Target.GFX950)

    @property
    def is_gpu(self) -> bool:
        return self is not Target.CPU


_planned: Target | None = None
_product: str | None = None
_stand_in = "meta"

COMPUTE_UNITS = {Target.SM90: 132, Target.GFX942: 304, Target.GFX950: 256}
"""Multiprocessors of an H100 SXM, compute units of an MI300X and an MI355X (the vendors' data sheets)."""


REFERENCE_DEVICE = {
    Target.CPU: "CPU",
    Target.SM90: "NVIDIA H100 80GB HBM3",
    Target.GFX942: "AMD Instinct MI300X",
    Target.GFX950: "AMD Instinct MI355X",
}
"""The product that stands for a target where no device is there to ask, as torch names it."""


@contextmanager
@checks_enums
def planning_for(target: Target, product: str | None = None, stand_in: str = "meta") -> Iterator[None]:
    """Inside, the meta device stands for a ``target``: launchers can be called with tensors that have no data.

    For compiling what a call would launch (`epfuse.aot`); one at a time, not thread-safe.

    Args:
        target: a GPU.
        product: as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
        stand_in: type of the device that stands for it: "cpu" for tensors that have addresses and are never read.
    """
    global _planned, _product, _stand_in
    before = _planned, _product, _stand_in
    _planned, _product, _stand_in = target, product, stand_in
    _forget_devices()
    try:
        yield
    finally:
        _planned, _product, _stand_in = before
        _forget_devices()


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The target of ``device``.

    Raises:
        DeviceError: it is no torch.device.
        UnsupportedTarget: a GPU that epfuse has no kernels for.
    """
    if not isinstance(device, torch.device):
        raise DeviceError(f"device is {shown(device)}; it must be a torch.device")
    if device.type == _stand_in and _planned is not None:
        return _planned
    if device.type == "cpu":
        return Target.CPU
    if device.type == "cuda":
        if torch.version.hip is not None:
            arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
            for target in (Target.GFX942, Target.GFX950):
                if arch == target.value:
                    return target
            raise UnsupportedTarget(
                f"device {device} is {arch}; epfuse has kernels for gfx942, gfx950, sm_90 and the CPU"
            )
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) == (9, 0):
            return Target.SM90
        raise UnsupportedTarget(
            f"device {device} is sm_{major}{minor}; epfuse has kernels for gfx942, gfx950, sm_90 and the CPU"
        )
    raise UnsupportedTarget(
        f"device {device} is of type {device.type!r}; epfuse runs on 'cuda' (CUDA or ROCm) and 'cpu'"
    )


def device_of(name: str, value: object) -> torch.device:
    """``value`` as a device; whether it is there shows when something is put on it.

    Raises:
        DeviceError: it names no device.
    """
    if isinstance(value, str | torch.device):
        try:
            return torch.device(value)
        except RuntimeError as error:
            raise DeviceError(f"{name} is {shown(value)}; {str(error).splitlines()[0]}") from None
    raise DeviceError(f"{name} is {shown(value)}; it must be a torch.device or its name")


@functools.lru_cache(maxsize=64)
def compute_units(device: torch.device) -> int:
    """Multiprocessors (NVIDIA) or compute units (AMD) of ``device``; 1 for a CPU."""
    if device.type == _stand_in and _planned is not None:
        return COMPUTE_UNITS[_planned]
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches there, wherever the operands are, and graphs are captured there.

    Nothing happens if it is, or on a CPU.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of ``dtype`` without widening each number first.

    Where it does not, torch's product of BF16 or FP16 matrices takes many times as long as one in FP32.
    """
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@functools.lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The product, as torch names it: what tuned tables are keyed by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == _stand_in and _product is not None:
        return _product
    return REFERENCE_DEVICE[target_of(device)]


def _forget_devices() -> None:
    target_of.cache_clear()
    device_name.cache_clear()
    compute_units.cache_clear()


@functools.cache
@checks_enums
def overlap_previous(target: Target) -> dict[str, bool]:
    """Launch arguments of a Triton kernel that may start while the kernel before it drains, where the target can.

    Hopper's programmatic dependent launch: the kernel waits by itself, under its constexpr PDL, before it reads what
    the one before it wrote. The same dictionary every time: not to be changed.
    """
    return {"PDL": True, "launch_pdl": True} if target is Target.SM90 else {"PDL": False}
