"""Compile everything that was asked for, in parallel, and put the findings together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from epfuse.aot.gates import Gate, check
from epfuse.aot.kernels import Kernel
from epfuse.aot.predict import Prediction, predictions
from epfuse.aot.record import Record, TargetRecord
from epfuse.aot.tasks import Broken, Job, compile_job, list_jobs, start
from epfuse.config import Path as LayerPath
from epfuse.target import Target


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        targets: GPUs, none of which need be there.
        stages: names of stages.
        paths: paths of the layer.
        shapes, dtypes: names in `calls.SHAPES` and `calls.DTYPES`.
        workers: processes.
        folder: where to write the assembly; None doesn't.
        mca: path of llvm-mca, None leaves its column empty.
    """

    targets: tuple[Target, ...]
    stages: tuple[str, ...]
    paths: tuple[LayerPath, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    workers: int
    folder: Path | None = None
    mca: str | None = None


def run(request: Request, progress: Callable[[int, int], None]) -> Record:
    """Compile and judge.

    Args:
        request: what.
        progress: called with the kernels done and the kernels in all.
    """
    pool = ProcessPoolExecutor(request.workers, mp_context=get_context("spawn"), initializer=start)
    try:
        listings = [
            pool.submit(list_jobs, target, list(request.paths), list(request.shapes), list(request.dtypes))
            for target in request.targets
        ]
        jobs = [job for listing in listings for job in listing.result() if _wanted(job, request)]
        results = _compile(pool, jobs, request, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    targets = []
    for target in request.targets:
        own = [(job, result) for job, result in zip(jobs, results, strict=True) if job.launch.target is target]
        kernels = [result for job, result in own if isinstance(result, Kernel) and not job.compare]
        compared = [result for job, result in own if isinstance(result, Kernel) and job.compare]
        broken = tuple(f"{result.name}: {result.error}" for _, result in own if isinstance(result, Broken))
        gates = [Gate("compiles", len(own), broken), *check(target, kernels)]
        targets.append(TargetRecord(target, kernels, compared, gates))
    return Record(targets, _predictions(targets))


def _wanted(job: Job, request: Request) -> bool:
    # the kernel to compare with stands beside gate_up
    return ("gate_up" if job.compare else job.launch.stage) in request.stages


def _compile(
    pool: ProcessPoolExecutor, jobs: list[Job], request: Request, progress: Callable[[int, int], None]
) -> list[Kernel | Broken]:
    """One result a job, in their order."""
    futures: list[Future[Kernel | Broken]] = []
    for job in jobs:
        futures.append(pool.submit(compile_job, job, request.folder, request.mca))
    pending = set(futures)
    progress(0, len(jobs))
    while pending:
        _, pending = wait(pending, return_when=FIRST_COMPLETED)
        progress(len(jobs) - len(pending), len(jobs))
    results = []
    for job, future in zip(jobs, futures, strict=True):
        try:
            results.append(future.result())
        except BrokenProcessPool:
            results.append(Broken(job, "a compiling process died; this kernel was compiling or waiting"))
    return results


def _predictions(targets: list[TargetRecord]) -> list[Prediction]:
    for target in targets:
        if target.target is Target.GFX942:
            return predictions(target.kernels, target.compared)
    return []
