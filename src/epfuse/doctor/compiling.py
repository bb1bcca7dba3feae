"""Whether kernels can be compiled and kept, and whether a bundle makes that unnecessary."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from epfuse.doctor.finding import Answer, bad, good, warning
from epfuse.doctor.gpu import Vendor, this_device, vendor

COMPILE_SECONDS = 20.0
LEAST_FREE = 1 << 30
"""Bytes of a disk; the kernels of a large model's layers take some hundred MB."""
PROGRAM = "#include <Python.h>\nint epfuse_doctor(void) { return Py_IsInitialized(); }\n"
"""What the launchers that Triton compiles need: a shared library that knows Python's headers."""


def _lacking(found: str, fix: str) -> Answer:
    """Bad where kernels are to be compiled for a GPU that is there; where a bundle has them, or on a CPU, a warning."""
    from epfuse.bundle import bundle

    return bad(found, fix) if vendor() is not None and bundle() is None else warning(found, fix)


def _no_triton() -> Answer | None:
    """What to say where there is no triton, which is no fault without a GPU; the line of triton says what to do."""
    if importlib.util.find_spec("triton") is None:
        return good("none, as there is no triton")
    return None


def compiler() -> Answer:
    """A C compiler, as Triton looks for one: it compiles a launcher for each kernel."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return _lacking("none", "install gcc, or name one in CC; or bring kernels in a bundle ('epfuse warmup')")
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    with tempfile.TemporaryDirectory(prefix="epfuse-doctor-") as folder:
        source = Path(folder) / "probe.c"
        source.write_text(PROGRAM, encoding="utf-8")
        command = [found, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return _lacking(f"{found} can't be run: {error}", "install gcc, or name a compiler in CC")
    if done.returncode == 0:
        return good(f"{found}, with Python's headers")
    errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
    message = errors[0].partition("error:")[2].strip() or errors[0]
    if "Python.h" in message:
        return _lacking(
            f"{found}, but not Python's headers (Python.h)",
            "install them: python3-dev (Debian), python3-devel (Fedora)",
        )
    return _lacking(f"{found} does not compile: {message}", "mend it, or name another compiler in CC")


def ptxas() -> Answer:
    """NVIDIA's assembler; Triton has one, and TRITON_PTXAS_PATH may name another."""
    if (none := _no_triton()) is not None:
        return none
    from triton import knobs

    try:
        tool = knobs.nvidia.ptxas
        done = subprocess.run([tool.path, "--version"], capture_output=True, text=True, timeout=20, check=False)
        works = done.returncode == 0
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        works = False
    if works:
        return good(f"{tool.version}, {'of TRITON_PTXAS_PATH' if os.environ.get('TRITON_PTXAS_PATH') else 'triton'}'s")
    found, fix = "none that runs", "install triton again, or have TRITON_PTXAS_PATH name one"
    if vendor() is Vendor.NVIDIA:
        return bad(found, fix)
    return warning(f"{found}; an AMD GPU needs none, compiling for sm_90 does", fix)


def cache() -> Answer:
    """The folder in which compiled kernels are kept."""
    if (none := _no_triton()) is not None:
        return none
    from epfuse.kernel_cache import wanted_folder

    folder = wanted_folder()
    fix = "have TRITON_CACHE_DIR name a folder that can be written, on a local disk"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        place = os.statvfs(folder)
        kernels = sum(1 for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        return _lacking(f"{folder} can't be written ({error.strerror}): nothing that is compiled can be kept", fix)
    if place.f_flag & os.ST_NOEXEC:
        return _lacking(f"{folder} is on a file system that forbids to run what is on it (noexec)", fix)
    free = place.f_bavail * place.f_frsize
    if free < LEAST_FREE:
        return warning(f"{folder}: {free / 2**20:.0f} MiB are free on its disk", "make room, or " + fix)
    return good(f"{folder}: can be written, {kernels} entries, {free / 2**30:.0f} GiB free")


def kernel_bundle() -> Answer:
    """The folder that EPFUSE_KERNELS names: whether it was made for what is here, and is whole."""
    from epfuse.bundle import MANIFEST, Bundle
    from epfuse.environment import environment
    from epfuse.errors import ConfigError
    from epfuse.target import Target, target_of

    named = environment().kernels
    if named is None:
        if environment().no_compile:
            return warning(
                "EPFUSE_NO_COMPILE=1 forbids to compile after a warm-up, and there is no bundle",
                "make one ('epfuse warmup') and name its folder in EPFUSE_KERNELS",
            )
        return good("none (EPFUSE_KERNELS is not set): kernels are compiled when they are first called")
    again = "make it again with this epfuse and this triton: 'epfuse warmup'"
    try:
        found = Bundle.read(Path(named))
    except ConfigError as error:
        return bad(f"it is not used: {error}", again)
    manifest = found.manifest
    days = (time.time() - (found.root / MANIFEST).stat().st_mtime) / 86400
    words = (
        f"{len(manifest.files)} files for {manifest.product} ({manifest.target}), {len(manifest.layers)} layers, up to"
        f" {manifest.max_tokens} tokens, {days:.0f} days old"
    )
    damaged = [name for name in manifest.files if found.file(*name.split("/")) is None]
    if damaged:
        return bad(f"{words}; {len(damaged)} of them are missing or not what they were, {damaged[0]} for one", again)
    here = target_of(this_device())
    if here is not Target.CPU and here.value != manifest.target:
        return bad(f"{words}; this GPU is {here.value}", again)
    return good(words)
