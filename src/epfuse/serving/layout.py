"""Where a run's files lie. Every name below is a promise between dispatcher, job and report.

::

    RUN/run.json                             Run: what was asked, resolved
    RUN/journal.jsonl                        the dispatcher's
    RUN/dispatcher.lock                      who runs the run now
    RUN/points/NAME/cancel                   somebody wants the point's end
    RUN/points/NAME/point.json               PointJob: all that a job needs
    RUN/points/NAME/running/key              the claim: the folder is made atomically, by one attempt
    RUN/points/NAME/attempts/KEY/job.log     an attempt
    RUN/points/NAME/attempts/KEY/versions.json
    RUN/points/NAME/attempts/KEY/leg-1-baseline/server.log, client.log, result.json, gate.json, gpu.csv, ...
    RUN/points/NAME/done.json                Done: the truth, written last
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_object
from epfuse.report.write import write_atomic
from epfuse.serving.done import Done
from epfuse.serving.point import Frozen, PointJob, Run

Model = TypeVar("Model", bound=Frozen)


def make_key(run: str, point: str, attempt: int) -> str:
    """The name of one submission: ``run-point-attempt``, fit for a file and for a Slurm job.

    Attempts count from 1.
    """
    return f"{run}-{point}-{attempt}"


def attempt_of(key: str, run: str, point: str) -> int:
    """The attempt that a key of this run's point names.

    Raises:
        ConfigError: it is another's key.
    """
    found = re.fullmatch(rf"{re.escape(run)}-{re.escape(point)}-([1-9][0-9]*)", key)
    if found is None:
        raise ConfigError(f"key is {key!r}; one of point {point!r} of run {run!r} begins with {run}-{point}-")
    return int(found[1])


class FileIn:
    """A path in the folder that it is asked of.

    Args:
        name: relative to the folder.
    """

    def __init__(self, name: str) -> None:
        self.name: str = name

    def __get__(self, folder: Any, kind: type[object]) -> Path:
        path: Path = folder.path
        return path / self.name


@dataclass(frozen=True)
class LegFolder:
    """One server's files in an attempt."""

    path: Path

    server_log: ClassVar[FileIn] = FileIn("server.log")
    client_log: ClassVar[FileIn] = FileIn("client.log")
    result: ClassVar[FileIn] = FileIn("result.json")
    """The load tool's own result, as it wrote it, with per-request data."""
    gate: ClassVar[FileIn] = FileIn("gate.json")
    """Log probabilities and tokens that the gate saw."""
    gpu_samples: ClassVar[FileIn] = FileIn("gpu.csv")
    """CSV, one line a sample and GPU."""
    trace: ClassVar[FileIn] = FileIn("trace.json.gz")
    profile: ClassVar[FileIn] = FileIn("profile.json")
    """What ``epfuse profile --json`` says of the trace."""


@dataclass(frozen=True)
class AttemptFolder:
    """What one attempt leaves; two attempts share no file."""

    path: Path

    job_log: ClassVar[FileIn] = FileIn("job.log")
    """Standard output and error of the job's script."""
    versions: ClassVar[FileIn] = FileIn("versions.json")
    """JSON object: packages, driver, image digest, plugin's hash, clocks, node."""

    def leg(self, number: int, arm: str) -> LegFolder:
        """The folder of the ``number``-th server (from 1)."""
        return LegFolder(self.path / f"leg-{number}-{arm}")


@dataclass(frozen=True)
class PointFolder:
    """One point's folder."""

    path: Path

    job: ClassVar[FileIn] = FileIn("point.json")
    running: ClassVar[FileIn] = FileIn("running")
    claim: ClassVar[FileIn] = FileIn("running/key")
    """Text: the key of the attempt that holds the point."""
    done: ClassVar[FileIn] = FileIn("done.json")
    cancel: ClassVar[FileIn] = FileIn("cancel")
    """It is asked that the point end; the dispatcher that runs it sees it, or the next one."""

    def attempt(self, key: str) -> AttemptFolder:
        """The folder of one attempt."""
        return AttemptFolder(self.path / "attempts" / key)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: all that is known of it, for any machine that sees it."""

    path: Path

    run: ClassVar[FileIn] = FileIn("run.json")
    journal: ClassVar[FileIn] = FileIn("journal.jsonl")
    lock: ClassVar[FileIn] = FileIn("dispatcher.lock")
    """Of the run's one dispatcher (`epfuse.serving.lock`)."""

    def point(self, name: str) -> PointFolder:
        """The folder of the point of this name."""
        return PointFolder(self.path / "points" / name)

    def create(self, run: Run, jobs: list[PointJob]) -> None:
        """Write a new run; ``run.json`` comes last, so a folder that has it is whole.

        Raises:
            ConfigError: the folder has a run, or the jobs are not the run's points.
            OSError: it can't be written.
        """
        if self.run.exists():
            raise ConfigError(f"{self.path} has a run already; give another folder, or resume that one")
        if tuple(job.point.name for job in jobs) != run.points:
            raise ConfigError("jobs are not the points of the run, in its order")
        for job in jobs:
            folder = self.point(job.point.name)
            folder.path.mkdir(parents=True, exist_ok=True)
            write_model(folder.job, job)
        write_model(self.run, run)

    def read_run(self) -> Run:
        """The run; `read_model` says what is raised."""
        return read_model(self.run, Run, "run")

    def read_job(self, name: str) -> PointJob:
        """The job of a point.

        Raises:
            ConfigError: as `read_model`; or the file is another point's.
        """
        path = self.point(name).job
        job = read_model(path, PointJob, "point")
        _check_name(path, job.point.name, name)
        return job

    def read_done(self, name: str) -> Done | None:
        """The end of a point; None while it has none.

        Raises:
            ConfigError: as `read_model`; or the file is another point's, whose figures would be told as this one's.
        """
        path = self.point(name).done
        if not path.exists():
            return None
        done = read_model(path, Done, "end of a point")
        _check_name(path, done.name, name)
        return done


def _check_name(path: Path, found: str, name: str) -> None:
    if found != name:
        raise ConfigError(f"{path} is of point {found!r}, in the folder of {name!r}; copied from there?")


def write_model(path: Path, model: Frozen) -> None:
    """Write a model as JSON: temporary file, fsync, rename.

    Raises:
        OSError: it can't be written; the old file is as it was.
    """
    write_atomic(path, model.model_dump_json(by_alias=True, indent=2) + "\n")


def read_model(path: Path, kind: type[Model], what: str) -> Model:
    """A model from its JSON file.

    Args:
        path: of the file.
        kind: its class.
        what: the file's content in words, for messages.

    Raises:
        ConfigError: it can't be read, is torn, or does not fit; the message names file and place.
    """
    try:
        return kind.model_validate(read_object(path, what))
    except ValidationError as error:
        where, fault = first_fault(error, "the file")
        raise ConfigError(f"{what} {path}: {where}: {fault}") from None
