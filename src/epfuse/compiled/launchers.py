"""What Triton compiles besides a kernel, in C: the module that talks to the driver, and up to 3.6 a launcher a kernel.

It needs a C compiler and, to link against, libcuda.so.1, which comes with the GPU's driver. On a machine without a
driver a library of that name does whose functions are empty: what is linked names it, and loads the real one. A library
without any would be left out by the linker, and nothing would be loaded.

Triton keeps such a module by its source and by what Python's ``platform.architecture`` says, which runs the program
``file``: another key where that is not installed. An image may lack what the machine has that the bundle was made on,
so a module is compiled under both keys.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton import knobs

from epfuse.errors import MissingDependency
from epfuse.target import Target

LIBRARY = "libcuda.so.1"
LINKAGES = ("ELF", "")
"""What ``platform.architecture`` says of Python's executable, with the program ``file`` and without."""


def compile_driver_module(target: Target) -> None:
    """Compile, where Triton's cache goes now, the module that talks to the driver of ``target``.

    Nothing on AMD: Triton's module there names the path of the ROCm library that it finds.

    Raises:
        MissingDependency: there is no C compiler that works.
    """
    if not target.is_amd:
        _compile_for_each_image(lambda: _nvidia().CudaUtils())


def compile_launcher(compiled: Any, target: Target) -> None:
    """Compile the launcher of a kernel of Triton's, where there is one, as up to 3.6 on NVIDIA's GPUs.

    Raises:
        MissingDependency: there is no C compiler that works.
    """
    if not target.is_amd and hasattr(_nvidia(), "make_launcher"):
        _compile_for_each_image(lambda: _nvidia().CudaLauncher(compiled.src, compiled.metadata))


def _compile_for_each_image(make: Callable[[], object]) -> None:
    """Have Triton compile a module under both keys, and keep it; to load it takes the driver."""
    with _linking():
        for linkage in LINKAGES:
            with _where(linkage), contextlib.suppress(ImportError):
                make()


def _nvidia() -> Any:
    return importlib.import_module("triton.backends.nvidia.driver")


@contextlib.contextmanager
def _where(linkage: str) -> Iterator[None]:
    """Inside, Triton's keys of modules are those of a machine on which ``file`` says this, or is not installed."""
    key, said = importlib.import_module("triton.runtime.build").platform_key, platform.architecture
    bits, _ = said()
    platform.architecture = lambda *_: (bits, linkage)
    key.cache_clear()
    try:
        yield
    finally:
        platform.architecture = said
        key.cache_clear()


@contextlib.contextmanager
def _linking() -> Iterator[None]:
    """Inside, what Triton compiles is linked against a library that stands for the driver's, or the one that is named.

    The library lies in a folder that is there no longer than that: processes that compile are ended, not left to end.

    Raises:
        MissingDependency: there is no C compiler that works.
    """
    library = _stand_in()
    # Kernels share launchers. Of one that it has made, but can't load here, Triton warns before it makes it again.
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    if knobs.nvidia.libcuda_path is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="epfuse-libcuda-") as place, knobs.nvidia.scope():
        Path(place, LIBRARY).write_bytes(library)
        knobs.nvidia.libcuda_path = place
        _look_again()
        try:
            yield
        finally:
            _look_again()


def _look_again() -> None:
    """Have Triton forget where the driver's library was."""
    driver = _nvidia()
    for kept in (driver.libcuda_dirs, driver.library_dirs):
        kept.cache_clear()


@functools.cache
def _stand_in() -> bytes:
    """A library that has the names that Triton calls of the driver's.

    Raises:
        MissingDependency: there is no C compiler that works.
    """
    compiler = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang"))  # as Triton takes it
    if compiler is None:
        raise MissingDependency("launchers are compiled in C, and there is no C compiler here; install gcc, or set CC")
    folder = Path(_nvidia().__file__).parent
    called = {name for file in folder.glob("driver.*") for name in re.findall(r"\bcu[A-Z]\w+", file.read_text())}
    source = "".join(f"void {name}(void) {{}}\n" for name in sorted(called))
    with tempfile.TemporaryDirectory(prefix="epfuse-libcuda-") as place:
        path = Path(place, LIBRARY)
        command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{LIBRARY}"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, input=source.encode())
        except OSError as error:
            raise MissingDependency(f"launchers are compiled in C, and CC is {compiler!r}: {error.strerror}") from error
        if done.returncode or not path.is_file():
            said = done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}"
            raise MissingDependency(f"launchers are compiled in C, and {compiler!r} makes no library: {said}")
        return path.read_bytes()
