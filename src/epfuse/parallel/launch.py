"""Run one function on P ranks of this machine: it ends with every result, or with the name of a rank that failed."""

from __future__ import annotations

import enum
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epfuse.arguments import checks_enums
from epfuse.children import Children, join
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.parallel.group import EPGroup
from epfuse.parallel.limits import check_limits
from epfuse.parallel.watch import WaitLog, Watch
from epfuse.target import target_of

STALL_SECONDS = 60.0
"""How long a rank may hold the others without doing anything."""
COLLECTIVE_LIMIT = timedelta(minutes=10)
"""How long a rank waits for one that is busy; only a rank that never comes takes longer."""
GRACE_SECONDS = 1.0
"""For ranks that fail together to say why, and for those that are done to end by themselves."""
LOOK_SECONDS = 0.5


class Placement(enum.Enum):
    """Where the ranks of one machine run and how they talk."""

    CPU = "cpu"
    """Every rank on the CPU, gloo."""
    GPU_EACH = "gpu each"
    """One GPU a rank, NCCL or RCCL."""
    GPU_SHARED = "gpu shared"
    """Fewer GPUs than ranks: they take turns on them; gloo through host memory, since NCCL refuses to share a GPU."""

    @classmethod
    def choose(cls, ranks: int) -> Placement:
        """The best placement of ``ranks`` ranks on this machine; GPUs that epfuse has no kernels for don't count."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            try:
                target_of(torch.device("cuda", 0))
            except UnsupportedTarget:
                gpus = 0
        if gpus >= ranks:
            return cls.GPU_EACH
        return cls.GPU_SHARED if gpus else cls.CPU

    @property
    def backend(self) -> str:
        """torch.distributed's name of the backend."""
        return "nccl" if self is Placement.GPU_EACH else "gloo"

    def device(self, rank: int) -> torch.device:
        """The device of a rank."""
        if self is Placement.CPU:
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())


@dataclass(frozen=True)
class RankContext:
    """What a rank's function gets to know about where it runs."""

    group: EPGroup
    device: torch.device


class RankFailed(RuntimeError):
    """A rank raised, died, or held the others; the message names the rank and what it did."""


@dataclass(frozen=True)
class _Job:
    """What a rank is started with; ``call`` is the pickled function and its arguments."""

    call: bytes
    ranks: int
    placement: Placement
    folder: Path
    log_dir: Path
    children: int


@dataclass(frozen=True)
class _Report:
    """How a rank's function ended.

    Attributes:
        result: what it returned.
        error: what it raised.
        time: when, by `time.monotonic`, which all processes of a machine share.
        waited: seconds for which it had been waiting for other ranks then; None where it wasn't.
    """

    result: Any = None
    error: str | None = None
    time: float = 0.0
    waited: float | None = None


@checks_enums
def launch_ranks(
    entry: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    ranks: int,
    placement: Placement,
    log_dir: Path,
    preload: tuple[str, ...] = (),
    stall_seconds: float = STALL_SECONDS,
) -> list[Any]:
    """Call ``entry(context, *args)`` on every rank and return what each returned, by rank.

    Each rank is a process with a default process group over the loopback interface, one CPU thread, and its stdout and
    stderr in files under ``log_dir``, so that a launcher's own stdout stays clean. No rank, nor what it started,
    outlives the call or this process, however that ends.

    Args:
        entry: a module-level function.
        args: arguments after the context; they and the results are pickled.
        ranks: P.
        placement: devices and backend.
        log_dir: an existing folder for the ranks' output.
        preload: modules that the ranks import; on the CPU they are imported once, in the server that forks the ranks.
        stall_seconds: how long a rank may be stopped, or do nothing while others wait for it.

    Raises:
        ConfigError: ``ranks`` is below 1, or more than this machine's limits let start, or there is no ``log_dir``;
            nothing has been started then.
        RankFailed: a rank raised, died, couldn't be started or held the others; all are ended.
        SystemExit: this process got SIGTERM or SIGHUP (the main thread only); the ranks are ended first.
    """
    if ranks < 1:
        raise ConfigError(f"ranks is {ranks}; it must be at least 1")
    if not log_dir.is_dir():  # or each rank would end before it can say why
        raise ConfigError(f"log_dir is {log_dir}; it must be a folder that is there")
    check_limits(ranks)
    # Importing torch and a model library costs seconds of CPU per process. A fork server pays once; on a GPU it is not
    # safe, because an import may touch the driver and a forked process can't use that.
    context: Any = multiprocessing.get_context("forkserver" if placement is Placement.CPU else "spawn")
    if placement is Placement.CPU:
        context.set_forkserver_preload(["epfuse.parallel.launch", *preload])
    with _signals_raise(), tempfile.TemporaryDirectory() as name, Children() as children:
        job = _Job(pickle.dumps((entry, args)), ranks, placement, Path(name), log_dir, children.id)
        processes: list[BaseProcess] = []
        try:
            for rank in range(ranks):
                processes.append(context.Process(target=_run_rank, args=(job, rank), name=f"rank {rank}", daemon=True))
                try:
                    processes[-1].start()
                except (OSError, EOFError) as error:
                    processes.pop()
                    raise RankFailed(f"rank {rank} of {ranks} failed: it couldn't be started: {error!r}") from error
            return _results(processes, job, stall_seconds)
        finally:
            children.end()
            for process in processes:
                process.kill()  # one that was too young to have joined
                process.join(GRACE_SECONDS)


def _run_rank(job: _Job, rank: int) -> None:
    join(job.children)
    output = job.log_dir / f"rank-{rank}"
    output.mkdir(exist_ok=True)
    for stream, name in ((1, "stdout.log"), (2, "stderr.log")):
        file = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, stream)
        os.close(file)
    # P ranks share the machine's cores: more than one thread each only makes them fight
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not resolve
    waits = WaitLog(job.folder, rank)
    try:
        entry, args = pickle.loads(job.call)
        with waits.waiting():
            dist.init_process_group(
                job.placement.backend,
                store=dist.FileStore(str(job.folder / "store"), job.ranks),  # type: ignore[attr-defined]
                rank=rank,
                world_size=job.ranks,
                timeout=COLLECTIVE_LIMIT,
            )
            if job.placement.backend == "gloo":  # connects here; a rank that is done at once would break the others off
                dist.barrier()
        device = job.placement.device(rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        result = entry(RankContext(replace(EPGroup.current(), waiting=waits.waiting), device), *args)
        dist.destroy_process_group()
        _write_report(job.folder, rank, _Report(result))
    except BaseException as error:  # SystemExit is no result either
        now = time.monotonic()
        waited = None if waits.since is None else now - waits.since
        traceback.print_exc()
        _write_report(job.folder, rank, _Report(None, f"{type(error).__name__}: {error}", now, waited))
        sys.stderr.flush()
        os._exit(1)  # a group that has failed can't be left in good order, and the other ranks are to learn of it now


def _results(processes: Sequence[BaseProcess], job: _Job, stall_seconds: float) -> list[Any]:
    """Wait for all; a rank is done when its report is there, whatever keeps its process from ending."""
    pids = [process.pid for process in processes]
    watch = Watch(job.folder, [pid for pid in pids if pid is not None], stall_seconds)
    pause = min(LOOK_SECONDS, stall_seconds / 4)
    reports: dict[int, _Report | None] = {}
    looked, failed_at = time.monotonic(), None
    while len(reports) < job.ranks:
        running = [rank for rank in range(job.ranks) if rank not in reports]
        wait([processes[rank].sentinel for rank in running], timeout=pause)
        for rank in running:
            ended = processes[rank].exitcode is not None  # asked before: then what it has written is complete
            report = _read_report(job.folder, rank)
            if ended or report is not None:
                reports[rank] = report
        now = time.monotonic()
        if failed_at is None and any(report is None or report.error for report in reports.values()):
            failed_at = now
        if failed_at is not None and now - failed_at >= GRACE_SECONDS:
            break
        # where this process was stopped itself, or all of the machine was, nobody can say what ranks did meanwhile
        watch.look(min(now - looked, 2 * pause))
        looked = now
        stuck = watch.stuck([rank for rank in running if rank not in reports])
        if stuck is not None and failed_at is None:
            raise RankFailed(_sentence(stuck.ranks, job, f"{stuck.how}; process {_list(pids, stuck.ranks)}"))
    if failed_at is not None:
        raise RankFailed(_cause(processes, reports, job, watch))
    return [report.result for _, report in sorted(reports.items()) if report is not None]


def _cause(processes: Sequence[BaseProcess], reports: dict[int, _Report | None], job: _Job, watch: Watch) -> str:
    """What came first: the other ranks fail for want of the rank that failed."""
    errors = {rank: report for rank, report in reports.items() if report is not None and report.error is not None}
    for rank, report in reports.items():  # in the order in which they were found
        if report is None:
            what = _end_of(processes[rank], job.log_dir / f"rank-{rank}" / "stderr.log")
            behind = watch.behind(rank)
            if behind and processes[rank].exitcode == -signal.SIGABRT and job.placement.backend == "nccl":
                # so NCCL's watchdog ends a rank that has waited for too long
                return _sentence(behind, job, f"never came to where others waited; rank {rank} was {what}")
            return _sentence([rank], job, what)
    own = {rank: report for rank, report in errors.items() if report.waited is None}
    rank, first = min((own or errors).items(), key=lambda item: item[1].time)
    if first.waited is not None:
        behind = watch.behind(rank)
        returned = [other for other in behind if other in reports and other not in errors]
        if returned:
            return _sentence(returned, job, f"returned while others waited; rank {rank} got {first.error}")
        if behind and first.waited >= 0.9 * COLLECTIVE_LIMIT.total_seconds():
            return _sentence(behind, job, f"never came to where others waited; rank {rank} got {first.error}")
    return _sentence([rank], job, str(first.error))


def _sentence(ranks: Sequence[int], job: _Job, what: str) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {_list(range(job.ranks), ranks)} of {job.ranks} failed: {what}"


def _list(names: Sequence[object], places: Sequence[int]) -> str:
    return ", ".join(str(names[place]) for place in places)


def _end_of(process: BaseProcess, log: Path) -> str:
    """How a process ended that could write no report."""
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        how = f"ended by {name}" + (", as the kernel does when memory is short" if name == "SIGKILL" else "")
    else:
        how = f"ended with exit code {code} and no result"
    lines = _tail(log).split("\n")
    return f"{how}: {lines[-1]}" if lines[-1] else how


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _write_report(folder: Path, rank: int, report: _Report) -> None:
    unfinished = folder / f"report-{rank}.part"
    unfinished.write_bytes(pickle.dumps(report))
    unfinished.rename(_report_file(folder, rank))


def _read_report(folder: Path, rank: int) -> _Report | None:
    """What a rank has written, in a folder that is this user's alone; None if it hasn't."""
    try:
        content = _report_file(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    report: _Report = pickle.loads(content)
    return report


def _report_file(folder: Path, rank: int) -> Path:
    return folder / f"report-{rank}"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception does, so that what the block holds is released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
