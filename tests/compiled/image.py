"""A process in an image: Triton's own driver and launchers, on a libcuda that does nothing (`test_bundle.py`).

usage: python image.py LIBCUDA. Prints as JSON what it launched, and which kernels Triton looked for.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs

CALLED = """cuCtxGetCurrent cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain
cuDriverGetVersion cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuModuleGetFunction cuModuleLoadData
cuOccupancyMaxActiveClusters cuPointerGetAttribute cuPointerGetAttributes cuTensorMapEncodeIm2col
cuTensorMapEncodeTiled"""
LIBCUDA = "\n".join(
    (
        *(f"int {name}(void) {{ return 0; }}" for name in CALLED.split()),
        "int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }",
        "int cuFuncGetAttribute(int *value, int which) { *value = which ? 0 : 1024; return 0; }",  # 0: most threads
        "int launches;",
        "int cuLaunchKernelEx(void) { launches++; return 0; }",
    )
)
"""What Triton calls of the driver, in C: everything succeeds, and launches are counted."""


def pretend() -> None:
    """Have torch and Triton take this machine for one with an H100; Triton makes its driver when it is asked."""
    from triton.backends.nvidia.driver import CudaDriver

    changes: list[tuple[Any, str, Any]] = [
        (CudaDriver, "is_active", staticmethod(lambda: True)),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)


def main(libcuda: str) -> None:
    pretend()
    compiled: list[tuple[str, bool]] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        compiled.append((src.name, cache_hit))

    knobs.compilation.listener = listen
    from epfuse import kernel_cache
    from epfuse.compiled.warm_up import warm_up
    from epfuse.config import LayerShape, Path
    from epfuse.families.family import CallKind
    from epfuse.target import Target, planning_for
    from tests.compiled import keys

    shape = LayerShape(hidden=256, intermediate=128, experts=4, local_experts=4, top_k=2)  # `test_bundle.py`'s model
    layer = CallKind(Path.BF16, Target.SM90, shape)
    warm_up(layer, 2, lambda line: None)
    assert type(triton.runtime.driver.active).__name__ == "CudaDriver"
    launches = ctypes.c_int.in_dll(ctypes.CDLL(libcuda), "launches")
    assert launches.value == 0  # loaded alone
    with planning_for(layer.target, layer.device, stand_in="cpu"):
        keys.drawn(layer, seed=3, count=5, most=2)()
    said = platform.architecture()[1]
    late = kernel_cache.late_compiles()
    print(json.dumps({"launched": launches.value, "compiled": compiled, "late": late, "file": said}))


if __name__ == "__main__":
    main(sys.argv[1])
