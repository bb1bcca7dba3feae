"""An allocator for torch that ends every tensor at the end of mapped memory: to read past it is an error at once.

torch's own cuts tensors out of blocks of megabytes, so a kernel that reads past one finds another one's bytes, and now
and then the end of a block. Here a tensor has memory of its own between two pieces of address space that nothing is
mapped to; at most 15 bytes lie behind it, because kernels are promised 16. No tool is needed, and kernels run at their
own speed; to allocate takes long, and to free waits for the device, which a graph being captured does not allow.

    PYTHONPATH=. python3 -m tools.gpu_suite.fence     # does it stop a kernel here?
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALIGNMENT = 16
_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3  # CUmemAllocationType, CUmemLocationType, CUmemAccess_flags
_installed: list[object] = []
"""What C code holds pointers to."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class Fence:
    """Memory with nothing before and behind it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._pieces: dict[int, tuple[int, int, int, int]] = {}  # pointer -> reserved, its size, mapped size, handle

    def _ask(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise MemoryError(f"{name} gave {code}")

    def allocate(self, size: int, device: int) -> int:
        """Address of ``size`` bytes that end where the mapping does."""
        location = _Location(_DEVICE, device)
        properties = _Properties(_PINNED, 0, location, None, (ctypes.c_ubyte * 8)())
        granularity, address, handle = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
        self._ask("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), 0)
        grain = granularity.value
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        mapped = -(-taken // grain) * grain
        reserved = mapped + 2 * grain
        nothing = ctypes.c_uint64(0)
        self._ask(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(reserved),
            ctypes.c_size_t(0),
            nothing,
            nothing,
        )
        self._ask("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(mapped), ctypes.byref(properties), nothing)
        inside = ctypes.c_uint64(address.value + grain)
        self._ask("cuMemMap", inside, ctypes.c_size_t(mapped), ctypes.c_size_t(0), handle, nothing)
        access = _Access(location, _READ_WRITE)
        self._ask("cuMemSetAccess", inside, ctypes.c_size_t(mapped), ctypes.byref(access), ctypes.c_size_t(1))
        pointer = inside.value + mapped - taken
        self._pieces[pointer] = (address.value, reserved, mapped, handle.value)
        return pointer

    def free(self, pointer: int) -> None:
        """Give back what `allocate` gave, once nothing runs that may use it."""
        address, reserved, mapped, handle = self._pieces.pop(pointer)
        self._ask("cuCtxSynchronize")
        inside = ctypes.c_uint64(address + (reserved - mapped) // 2)
        self._ask("cuMemUnmap", inside, ctypes.c_size_t(mapped))
        self._ask("cuMemRelease", ctypes.c_uint64(handle))
        self._ask("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(reserved))


def install() -> None:
    """Have torch allocate so from now on; before it has done anything on a GPU."""
    import torch

    fence = Fence(ctypes.CDLL("libcuda.so.1"))

    def allocate(size: int, device: int, stream: int | None) -> int | None:
        try:
            return fence.allocate(size, device) if size else None
        except MemoryError as error:
            print(f"fence: {error}", file=sys.stderr)
            return None

    def free(pointer: int | None, size: int, device: int, stream: int | None) -> None:
        try:
            if pointer:
                fence.free(pointer)
        except MemoryError as error:  # after a kernel was stopped nothing can be freed
            print(f"fence: {error}", file=sys.stderr)

    size, number, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    allocate_pointer = ctypes.CFUNCTYPE(pointer, size, number, pointer)(allocate)
    free_pointer = ctypes.CFUNCTYPE(None, pointer, size, number, pointer)(free)
    _installed.extend((fence, allocate_pointer, free_pointer))
    addresses = [ctypes.cast(each, ctypes.c_void_p).value for each in (allocate_pointer, free_pointer)]
    allocator = torch.cuda.memory._CUDAAllocator(torch._C._cuda_customAllocator(*addresses))
    _installed.append(allocator)
    torch.cuda.memory.change_current_allocator(allocator)


READS = """
import torch, triton, triton.language as tl
from tools.gpu_suite import fence

@triton.jit
def read(x, out, at):
    tl.store(out, tl.load(x + at))

fence.install()
x, out = torch.ones(1000, device="cuda"), torch.zeros(1, device="cuda")
read[(1,)](x, out, {at})
print(out.item())
"""


def check() -> str | None:
    """None, or why it does not stop a kernel here: one reads a tensor's last element, one the next."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "reads.py"
        ends = []
        for at in (999, 1000):
            script.write_text(READS.format(at=at))
            ends.append(subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False))
    if ends[0].returncode or ends[0].stdout.strip() != "1.0":
        return f"a read of the last element failed:\n{ends[0].stdout}{ends[0].stderr[-2000:]}"
    if not ends[1].returncode:
        return "a read past the end was not stopped"
    return None


if __name__ == "__main__":
    found = check()
    print(found or "a read past the end of a tensor is stopped, a read of its last element is not")
    raise SystemExit(found is not None)
