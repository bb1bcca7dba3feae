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


def compile_launchers(compiled: Any, target: Target) -> None:
    """Compile, where Triton's cache goes now, what a process needs that loads ``compiled``.

    Args:
        compiled: a kernel of Triton's.
        target: its GPU. On AMD nothing is compiled: Triton's module names the path of the ROCm library that it finds.

    Raises:
        MissingDependency: there is no C compiler.
    """
    if target.is_amd:
        return
    _link_without_a_driver()
    driver = importlib.import_module("triton.backends.nvidia.driver")
    for make in (driver.CudaUtils, functools.partial(driver.CudaLauncher, compiled.src, compiled.metadata)):
        with contextlib.suppress(ImportError, AttributeError):  # it is compiled and kept; to load it takes the driver
            make()


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
