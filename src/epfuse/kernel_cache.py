"""Where compiled kernels lie: in a folder that nobody moves while a process runs, and in a bundle that is only read.

Triton reads TRITON_CACHE_DIR at every compile, and others set it in the middle of a process: torch's inductor when it
makes its first kernel in Triton (`torch._inductor.runtime.triton_heuristics.CachingAutotuner`), vLLM when it compiles a
model. What is compiled after that is not where the next process looks before. So epfuse's kernels, and no others, go
through `KernelCache`, whose folder is settled once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from epfuse.bundle import bundle
from epfuse.environment import environment
from epfuse.errors import ConfigError, EpfuseError, MissingDependency, NotCompiled
from epfuse.kernel_keys import settle_key
from epfuse.launch_record import noted

log: logging.Logger = logging.getLogger(__name__)

_AT_START = os.environ.get("TRITON_CACHE_DIR")
_ours = threading.RLock()


def cached(kernel: Any) -> Any:
    """Have a kernel compiled through `KernelCache`, and its launches noted: a decorator above the ``jit``."""
    if isinstance(kernel, JITFunction):  # not where it is interpreted
        make = kernel.create_binder

        def create_binder() -> Any:
            found = make()
            kernel.compile = _through_cache(kernel.compile)
            settle_key(kernel)
            return found

        kernel.device_caches = defaultdict(create_binder)
        kernel.run = noted(kernel, _need_driver)
    return kernel


def _through_cache(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    def compile_and_load(*arguments: Any, **named: Any) -> Any:
        try:
            with kernels_in():
                found = compile_kernel(*arguments, **named)
                # it would at the launch, which follows; up to triton 3.6 it compiles a launcher too
                found._init_handles()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if _is_a_tool_s(error):
                raise _lacking(error) from error
            raise
        return found

    return compile_and_load


@contextlib.contextmanager
def kernels_in(place: Path | None = None) -> Iterator[None]:
    """Inside, Triton's kernels are looked for and kept where epfuse's are.

    A cache manager that the user has set (TRITON_CACHE_MANAGER) stays.

    Args:
        place: a folder to write all of them to, even those that are elsewhere; None for `folder` and the bundle.
    """
    with _ours:
        if knobs.cache.manager_class is not None:
            yield
            return
        manager = KernelCache if place is None else type("KernelsInPlace", (KernelCache,), {"place": place})
        knobs.cache.manager_class = manager
        try:
            yield
        finally:
            del knobs.cache.manager_class


class KernelCache(FileCacheManager):
    """Triton's files of one kernel: the bundle's, if it has them, else those in `folder`.

    A group's files are found beside it, wherever the folder has been brought since they were written.
    """

    place: Path | None = None

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        if override or dump:
            super().__init__(key, override, dump)
            return
        self.key = key
        self._bundle = bundle() if self.place is None else None

    @functools.cached_property
    def cache_dir(self) -> str:
        """Where files that are not the bundle's are; a process that finds all in the bundle needs no such folder."""
        return str((self.place or folder()) / self.key)

    @functools.cached_property
    def lock_path(self) -> str:
        """In there; Triton wants the name."""
        return os.path.join(self.cache_dir, "lock")

    def get_file(self, filename: str) -> str | None:
        """Where a file is; None if it is nowhere."""
        if self._bundle is not None and (shipped := self._bundle.file(self.key, filename)) is not None:
            return str(shipped)
        found: str | None = super().get_file(filename)
        return found

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Where the files of a compiled kernel are; None if one is missing, or is not whole."""
        group = self.get_file(f"__grp__{filename}")
        if group is not None:
            try:
                names = [str(name) for name in json.loads(Path(group).read_bytes())["child_paths"]]
            except (OSError, ValueError, KeyError, TypeError):
                names = []
            files = {name: self.get_file(name) for name in names}
            if files and all(path is not None and _is_whole(path) for path in files.values()):
                return {name: str(path) for name, path in files.items()}
        if self.place is None:
            _say_missing(filename.removesuffix(".json"))
        return None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Keep a file; the folder is made by the first one."""
        os.makedirs(self.cache_dir, exist_ok=True)
        path: str = super().put(data, filename, binary)
        return path


def _is_whole(path: str) -> bool:
    """Whether a file has content: a machine that went down may leave one with a name and without its bytes.

    Triton would fail at such a file in every process, before a server is ready or at its first call.
    """
    try:
        if path.endswith(".json"):
            json.loads(Path(path).read_bytes())
        return os.path.getsize(path) > 0
    except (OSError, ValueError):
        return False


def wanted_folder() -> Path:
    """Where kernels belong: TRITON_CACHE_DIR as it was when epfuse was imported, else Triton's folder in the home.

    A value that inductor has set by then is not the user's.
    """
    given = None if _AT_START is None or _is_inductors(_AT_START) else _AT_START
    return Path(given or knobs.cache.get_triton_dir("cache"))


@functools.cache
def folder() -> Path:
    """Where kernels are kept: `wanted_folder`, or a temporary one if that can't be written.

    That is said in a warning: everything is compiled again in the next process.

    Raises:
        ConfigError: there is no temporary folder either.
    """
    found = wanted_folder()
    try:
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            pass
    except OSError as error:
        try:
            spare = Path(tempfile.mkdtemp(prefix="epfuse-kernels-"))
        except OSError as none:
            raise ConfigError(
                f"compiled kernels can't be kept in {found} ({error.strerror}), nor in a temporary folder"
                f" ({none.strerror}); have TRITON_CACHE_DIR name a folder that can be written, or EPFUSE_KERNELS"
                " kernels that are compiled already ('epfuse warmup')"
            ) from none
        log.warning(
            "compiled kernels can't be kept in %s (%s) but in %s, for this process alone; TRITON_CACHE_DIR names"
            " another folder, and EPFUSE_KERNELS kernels that are compiled already ('epfuse warmup')",
            found,
            error.strerror,
            spare,
        )
        return spare
    return found


def _is_inductors(name: str) -> bool:
    """Whether a folder is the one that inductor chooses: ``triton/DEVICE`` in its own."""
    owner = Path(name).parent.parent
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(name).parent.name == "triton" and (owner.name.startswith("torchinductor_") or str(owner) == own)


class KernelMissing(Exception):
    """A kernel is not compiled."""


@contextlib.contextmanager
def only_asking() -> Iterator[None]:
    """Inside, in this thread, a kernel of ours that is not there raises `KernelMissing` in place of being compiled."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_compiled(compile_kernel: Callable[[], object]) -> bool:
    """Whether ``compile_kernel`` would find its kernel. Nothing is compiled."""
    try:
        with kernels_in(), only_asking():
            compile_kernel()
    except KernelMissing:
        return False
    return True


class _Late:
    """Kernels that were compiled after all had been said to be there."""

    ready = False
    count = 0


_asked: ContextVar[bool] = ContextVar("asked", default=False)


def say_ready(ready: bool = True) -> None:
    """From now on a kernel that is not there is worth a warning, or with EPFUSE_NO_COMPILE=1 an error."""
    _Late.ready = ready


def late_compiles() -> int:
    """How many kernels have been compiled since `say_ready`."""
    return _Late.count


def _say_missing(name: str) -> None:
    if _asked.get():
        raise KernelMissing
    if not _Late.ready:
        return
    if environment().no_compile:
        raise NotCompiled(
            f"kernel {name} is not compiled, and EPFUSE_NO_COMPILE=1 forbids to compile it now; warm up with more"
            " tokens, or make the bundle of EPFUSE_KERNELS again ('epfuse warmup')"
        )
    _Late.count += 1
    log.warning("kernel %s is compiled while requests wait for it (%d since the warm-up)", name, _Late.count)


def _take_driver() -> None:
    """Have Triton's driver made, if nobody has yet, with its module in C where epfuse's kernels are.

    Where there is a bundle it comes from that. Where Triton's own folder can't be written, Triton alone would fail.
    """
    if driver._active is None and (bundle() is not None or not _can_be_written(wanted_folder())):
        with contextlib.suppress(RuntimeError, EpfuseError):  # there is no GPU; what else lacks, a launch says
            _need_driver()


def _need_driver() -> None:
    """Have Triton's driver made, if nobody has yet, before a launch.

    Raises:
        MissingDependency: its module in C is not compiled, and can't be here.
    """
    if driver._active is not None:
        return
    try:
        with kernels_in():
            driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.CalledProcessError) as error:
        if isinstance(error, RuntimeError) and not _is_a_tool_s(error):
            raise  # there is no GPU
        raise _lacking(error) from error


def _is_a_tool_s(error: Exception) -> bool:
    """Whether Triton found no C compiler or ptxas, or the compiler failed or can't be run."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ("find C compiler", "Cannot find ptxas"))
    compiler = os.environ.get("CC")
    not_run = compiler is not None and getattr(error, "filename", None) == compiler
    return isinstance(error, subprocess.CalledProcessError) or not_run


def _lacking(error: Exception) -> MissingDependency:
    """What to say where a machine lacks what Triton compiles with."""
    said = str(error).partition("\n")[0].rstrip(".!") or type(error).__name__
    if isinstance(error, subprocess.CalledProcessError):
        said = f"{error.cmd[0]!r} failed with exit code {error.returncode}"
    return MissingDependency(
        f"Triton can't make here what launches a kernel: {said}; install gcc and Python's headers, or set CC, or have"
        " EPFUSE_KERNELS name a folder that 'epfuse warmup' has made elsewhere ('epfuse doctor' says what lacks)"
    )


def _can_be_written(place: Path) -> bool:
    """Whether a folder can be made there, or written. Nothing is made."""
    # pathlib's `exists` raises where a folder may not be entered
    there = next(at for at in (place, *place.parents) if os.path.exists(at))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


_take_driver()  # a kernel's module is imported before its first launch, which makes the driver
