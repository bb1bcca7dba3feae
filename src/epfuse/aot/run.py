"""Compile everything that was asked for, in parallel, and put the findings together."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from epfuse.aot.gates import Gate, check
from epfuse.aot.kernels import Kernel
from epfuse.aot.predict import Prediction, predictions
from epfuse.aot.record import AotRecord, TargetRecord
from epfuse.aot.tasks import Broken, Job, compile_job, list_jobs, start
from epfuse.arguments import checks_enums
from epfuse.config import Path
from epfuse.errors import CompilerDied
from epfuse.target import Target
from epfuse.workers import Died, Workers


@checks_enums
@dataclass(frozen=True)
class CompileRequest:
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
    paths: tuple[Path, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    workers: int
    folder: pathlib.Path | None = None
    mca: str | None = None


def run(request: CompileRequest, progress: Callable[[int, int], None]) -> AotRecord:
    """Compile and judge.

    Args:
        request: what.
        progress: called with the kernels done and the kernels in all.

    Raises:
        CompilerDied: a process died while it listed a target's kernels. One that dies while it compiles a kernel is
            that kernel's finding.
    """
    asked = (list(request.paths), list(request.shapes), list(request.dtypes))
    with Workers(request.workers, start) as workers:
        listings = workers.map(list_jobs, [(target, *asked) for target in request.targets], lambda done: None)
        jobs = []
        for target, listing in zip(request.targets, listings, strict=True):
            if isinstance(listing, Died):
                raise CompilerDied(f"the kernels of {target.value} could not be listed: {listing.reason}")
            jobs += [job for job in listing if _wanted(job, request)]
        results = _compile(workers, jobs, request, progress)
    targets = []
    for target in request.targets:
        own = [(job, result) for job, result in zip(jobs, results, strict=True) if job.launch.target is target]
        kernels = [result for job, result in own if isinstance(result, Kernel) and not job.compare]
        compared = [result for job, result in own if isinstance(result, Kernel) and job.compare]
        broken = tuple(f"{result.name}: {result.error}" for _, result in own if isinstance(result, Broken))
        gates = [Gate("compiles", len(own), broken), *check(target, kernels)]
        targets.append(TargetRecord(target, kernels, compared, gates))
    return AotRecord(targets, _predictions(targets))


def _wanted(job: Job, request: CompileRequest) -> bool:
    # the kernel to compare with stands beside gate_up
    return ("gate_up" if job.compare else job.launch.stage) in request.stages


def _compile(
    workers: Workers, jobs: list[Job], request: CompileRequest, progress: Callable[[int, int], None]
) -> list[Kernel | Broken]:
    """One result a job, in their order."""
    progress(0, len(jobs))
    found = workers.map(
        compile_job, [(job, request.folder, request.mca) for job in jobs], lambda done: progress(done, len(jobs))
    )
    return [
        Broken(job, result.reason) if isinstance(result, Died) else result
        for job, result in zip(jobs, found, strict=True)
    ]


def _predictions(targets: list[TargetRecord]) -> list[Prediction]:
    for target in targets:
        if target.target is Target.GFX942:
            return predictions(target.kernels, target.compared)
    return []
