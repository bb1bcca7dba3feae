"""Compile a layer's kernels in processes side by side, then load them into this one."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epfuse.aot.launches import Launch
from epfuse.aot.tasks import start
from epfuse.bundle import bundle
from epfuse.compiled.launchers import compile_driver_module, compile_launcher
from epfuse.compiled.layer import kernels, run_calls, token_counts
from epfuse.families.family import CallKind
from epfuse.kernel_cache import KernelMissing, folder, is_compiled, kernels_in, only_asking, say_ready
from epfuse.launch_record import only_loading
from epfuse.target import Target, planning_for
from epfuse.workers import Died, Workers

log: logging.Logger = logging.getLogger(__name__)

MOST_WORKERS = 16
"""Processes that compile; each takes some 0.7 GB of the host's memory, and none of the GPU's."""

_warm: set[tuple[CallKind, int]] = set()


def warm_up(layer: CallKind, max_tokens: int, say: Callable[[str], None] = log.info) -> None:
    """Have every kernel that calls of up to ``max_tokens`` tokens launch compiled and loaded on the current device.

    What is compiled already, in the bundle or in the folder of kernels, is only loaded. Of several processes of one
    host one compiles and the others wait for it. A layer like one before costs nothing. A kernel that is needed
    afterwards and is not there is counted (`epfuse.kernel_cache.late_compiles`).

    Args:
        layer: its calls, on the GPU that is there.
        max_tokens: the largest T.
        say: takes a line of progress.

    Host syncs: none; nothing is launched.
    """
    if (layer, max_tokens) in _warm:
        return
    _warm.add((layer, max_tokens))  # now: what fails for this layer is not tried again for each one like it
    say_ready(False)
    begun = time.monotonic()
    try:
        with only_asking():  # in most processes all are there, and this is all there is to do
            loaded = load(layer, max_tokens)
    except KernelMissing:
        compile_missing(layer, max_tokens, say)
        loaded = load(layer, max_tokens)
    say_ready(True)
    say(f"{loaded} kernels for 1 to {max_tokens} tokens are loaded, in {time.monotonic() - begun:.1f} s")


def compile_missing(layer: CallKind, max_tokens: int, say: Callable[[str], None]) -> None:
    """Compile what is not compiled yet of all that such calls launch; only one process of a host does at a time.

    Args:
        layer: its calls.
        max_tokens: the largest T.
        say: takes a line of progress.
    """
    wanted = kernels(layer, max_tokens)
    with _one_at_a_time():
        left = missing(wanted)  # another rank may have compiled them meanwhile
        if not left:
            return
        if (shipped := bundle()) is not None:
            made = f"{shipped.manifest.product} and up to {shipped.manifest.max_tokens} tokens"
            log.warning("EPFUSE_KERNELS, made for %s, lacks %d kernels of %s", made, len(left), layer)
        say(f"compiling {len(left)} of {len(wanted)} kernels for 1 to {max_tokens} tokens")
        for one in compile_all(left, jobs=_jobs(), done=functools.partial(_progress, say, len(left))):
            if one.failure is not None:
                log.warning("%s; it will be compiled when it is needed", one.failure)


def missing(launches: Sequence[Launch]) -> list[Launch]:
    """Those that are not compiled."""
    return [launch for launch in launches if not is_compiled(launch.compile)]


@dataclass(frozen=True)
class Made:
    """What compiling a kernel gave.

    Attributes:
        launch: the kernel's specialisation.
        cpu_seconds: that it took, of the compiler and the programs that it starts; None if it was not compiled.
        failure: a sentence; None if it was.
    """

    launch: Launch
    cpu_seconds: float | None
    failure: str | None


def compile_all(
    launches: Sequence[Launch], jobs: int, done: Callable[[int], None], place: Path | None = None
) -> list[Made]:
    """Compile in ``jobs`` processes, which need no GPU and take no GPU's memory.

    Args:
        launches: what to compile; the slowest kernels, persistent ones, first.
        jobs: processes.
        done: called with how many are done, after each.
        place: a folder to keep them in, with Triton's launchers; None for this process's own, without.

    Returns:
        Of each launch, the slowest first.
    """
    slowest_first = sorted(launches, key=lambda launch: "gate_up" not in launch.kernel)
    with Workers(min(jobs, len(launches)) or 1, start) as workers:
        if place is not None and launches:
            workers.map(_compile_module, [(launches[0].target, place)], lambda count: None)
        kept = place or folder()  # which may be a temporary one, of this process alone
        found = workers.map(_compile, [(launch, kept, place is not None) for launch in slowest_first], done)
    made = []
    for launch, result in zip(slowest_first, found, strict=True):
        reason = result.reason if isinstance(result, Died) else result
        if isinstance(reason, str):
            made.append(Made(launch, None, f"{launch.kernel} was not compiled: {reason}"))
        else:
            made.append(Made(launch, reason, None))
    return sorted(made, key=lambda one: -(one.cpu_seconds or 0.0))


def _compile(launch: Launch, place: Path, with_launcher: bool) -> float | str:
    """In a process of its own: seconds of CPU that it took, or what went wrong."""
    begun = sum(os.times()[:4])
    with kernels_in(place):
        try:
            compiled = launch.compile()
            if with_launcher:
                compile_launcher(compiled, launch.target)
        except Exception as error:  # whatever the compiler raises is the finding
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return sum(os.times()[:4]) - begun


def _compile_module(target: Target, place: Path) -> None:
    with kernels_in(place):
        compile_driver_module(target)


def load(layer: CallKind, max_tokens: int) -> int:
    """Have Triton find and load on the current device what is compiled; what is not is compiled here.

    Triton keeps kernels by the arguments of a launch. So the launchers are called as a call would call them, with
    tensors that have no memory, and each kernel stops before it is launched.

    Returns:
        How many there are.
    """
    with planning_for(layer.target, layer.device), only_loading() as found:
        run_calls(layer, token_counts(layer, max_tokens))
    return len(found)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait for the other processes of this host that use the folder of kernels."""
    with (folder() / "epfuse-warm-up.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however it ends
        yield


def _jobs() -> int:
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _progress(say: Callable[[str], None], whole: int, count: int) -> None:
    if count == whole or count % max(1, whole // 5) == 0:
        say(f"{count} of {whole} kernels are compiled")
