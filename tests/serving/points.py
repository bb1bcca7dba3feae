"""Points whose servers are stubs, and what a job makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from epfuse.serving.done import Done
from epfuse.serving.layout import PointFolder, write_model
from epfuse.serving.point import AccuracyGate, Arm, Client, Command, Deadlines, Point, PointJob, Polls
from epfuse.serving.server import free_port

STUB = Path(__file__).with_name("stub_server.py")
KEY = "run-p1-1"
MODEL = "stub-model"
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then sleeps.",
    "A second text, of other words: 1, 2, 3, 4, 5.",
)


def stub(*faults: str) -> Command:
    return Command(argv=(sys.executable, str(STUB), "{port}", MODEL, *faults))


def point_job(*arms: Arm, order: tuple[str, ...] = (), **changes: object) -> PointJob:
    """A point of six requests."""
    values: dict[str, object] = {
        "run": "run",
        "point": Point(
            name="p1", model=MODEL, prefix="stub", target="cpu", precision="fp32", isl=8, osl=4, concurrency=2, tp=1
        ),
        "arms": arms,
        "order": order or tuple(arm.name for arm in arms),
        "client": Client(tool="builtin", prompts=20, concurrency=2, warmups=4, isl=8, osl=4),
        "gate": AccuracyGate(prompts=TEXTS, repeats=1, greedy_tokens=4),
        "deadlines": Deadlines(ready=120, gate=120, warmup=120, load=120, evals=120, stop=30, free=1, job=400),
        "polls": Polls(ready=0.05, watch=0.05, gpu=0.1),
        "port": free_port(),
        "gpus": 0,
        "gpu_vendor": "none",
    }
    return PointJob.model_validate(values | changes)


def one_arm(*faults: str, **changes: object) -> PointJob:
    return point_job(Arm(name="baseline", server=stub(*faults)), **changes)


def two_arms(*faults: str, **changes: object) -> PointJob:
    """A right baseline, a candidate with faults."""
    arms = Arm(name="baseline", server=stub()), Arm(name="candidate", server=stub(*faults))
    return point_job(*arms, **changes)


def write(folder: Path, job: PointJob) -> PointFolder:
    folder.mkdir(exist_ok=True)
    point = PointFolder(folder)
    write_model(point.job, job)
    return point


def start(point: PointFolder, key: str = KEY) -> subprocess.Popen[bytes]:
    """A job as launchers start it."""
    root = Path(__file__).resolve().parents[2]
    with (point.path / f"{key}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "epfuse.serving.job", str(point.path), "--key", key],
            cwd=point.path,
            env=os.environ | {"PYTHONPATH": str(root / "src")},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ending(point: PointFolder) -> Done:
    return Done.model_validate_json(point.done.read_bytes())
