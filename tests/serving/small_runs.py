"""Runs of small points for tests of what runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from epfuse.serving.journal import Journal
from epfuse.serving.layout import RunFolder
from epfuse.serving.lock import RunLock
from epfuse.serving.point import Arm, Client, Command, Point, PointJob, Run

SIX = ("1k1k-c1", "1k1k-c16", "1k1k-c256", "8k1k-c1", "8k1k-c16", "8k1k-c256")


def make_run(
    path: Path, points: Sequence[str] = SIX, canary: str | None = None, name: str = "t", launcher: str = "local"
) -> RunFolder:
    """A run's folder, with its journal begun."""
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    jobs = [_job(name, point) for point in points]
    run = Run(
        name=name,
        recipe="test",
        recipe_sha256="0" * 64,
        epfuse="0",
        created=time.time(),
        points=tuple(points),
        canary=canary,
        launcher=launcher,
    )
    folder.create(run, jobs)
    Journal.begin(folder.journal, run.name, run.points, run.created)
    return folder


def open_run(folder: RunFolder) -> tuple[RunLock, Journal]:
    """Lock and journal of a run."""
    lock = RunLock(folder.lock)
    return lock, Journal(folder.journal, lock)


def _job(run: str, name: str) -> PointJob:
    point = Point(
        name=name, model="m", prefix="m", target="cpu", precision="fp8", isl=8, osl=8, concurrency=1, tp=1, ep=1
    )
    arm = Arm(name="baseline", server=Command(argv=("true",)))
    client = Client(prompts=1, concurrency=1, warmups=1, isl=8, osl=8)
    return PointJob(run=run, point=point, arms=(arm,), order=("baseline",), client=client, gpus=0, gpu_vendor="none")
