"""What Triton compiles besides a kernel, in C: the module that talks to the driver, and up to 3.6 a launcher a kernel.

It needs a C compiler and, to link against, libcuda.so.1, which comes with the GPU's driver. On a machine without a
driver an empty library of that name does: what is linked looks for the real one when it is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from typing import Any

from triton import knobs

from epfuse.errors import MissingDependency
from epfuse.target import Target


def compile_driver_module(target: Target) -> None:
    """Compile, where Triton's cache goes now, the module that talks to the driver of ``target``.

    Nothing on AMD: Triton's module there names the path of the ROCm library that it finds.

    Raises:
        MissingDependency: there is no C compiler.
    """
    if not target.is_amd:
        _link_without_a_driver()
        with contextlib.suppress(ImportError):  # it is compiled and kept; to load it takes the driver
            _nvidia().CudaUtils()


def compile_launcher(compiled: Any, target: Target) -> None:
    """Compile the launcher of a kernel of Triton's, where there is one, as up to 3.6 on NVIDIA's GPUs.

    Raises:
        MissingDependency: there is no C compiler.
    """
    if not target.is_amd and hasattr(_nvidia(), "make_launcher"):
        _link_without_a_driver()
        with contextlib.suppress(ImportError):
            _nvidia().CudaLauncher(compiled.src, compiled.metadata)


def _nvidia() -> Any:
    return importlib.import_module("triton.backends.nvidia.driver")


@functools.cache
def _link_without_a_driver() -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MissingDependency("launchers are compiled in C, and there is no C compiler here; install gcc, or set CC")
    if knobs.nvidia.libcuda_path is not None:
        return
    place = tempfile.mkdtemp(prefix="epfuse-libcuda-")
    library = os.path.join(place, "libcuda.so.1")
    command = [compiler, "-shared", "-x", "c", os.devnull, "-o", library, "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    knobs.nvidia.libcuda_path = place
