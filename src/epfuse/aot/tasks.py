"""What the compiling processes do: list a target's launches, compile one of them.

Imported by processes that may not have Triton's interpreter switched on; this module loads neither torch nor Triton.
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epfuse.aot.kernels import Kernel, KernelUse
    from epfuse.aot.launches import Launch
    from epfuse.config import Path
    from epfuse.target import Target


@dataclass(frozen=True)
class Job:
    """One kernel to compile.

    Attributes:
        launch: the kernel's specialisation.
        use: the calls that launch it.
        compare: whether it is only there to be compared with, and bound by no gate.
    """

    launch: Launch
    use: KernelUse
    compare: bool = False


@dataclass(frozen=True)
class Broken:
    """A kernel that did not compile, and what the compiler said."""

    job: Job
    error: str

    @property
    def name(self) -> str:
        """Stage, path and kernel."""
        return f"{self.job.launch.stage} {'+'.join(self.job.use.paths)} {self.job.launch.kernel}"


def start() -> None:
    """Prepare a process: kernels are compiled, not interpreted, whatever the parent's environment says."""
    os.environ.pop("TRITON_INTERPRET", None)


def list_jobs(target: Target, paths: list[Path], shapes: list[str], dtypes: list[str]) -> list[Job]:
    """Every kernel that the calls of ``target`` launch, each once, and the kernel to compare with."""
    from epfuse.aot.calls import SHAPES, Call, calls
    from epfuse.aot.kernels import KernelUse
    from epfuse.aot.launches import launches_of
    from epfuse.aot.seed.launch import launch_two_tiles
    from epfuse.config import Combine, Path, WeightFormat

    found: dict[Launch, list[Call]] = {}
    for call in calls(target, paths, shapes, dtypes):
        for launch in launches_of(target, call.run):
            found.setdefault(launch, []).append(call)
    jobs = [Job(launch, KernelUse.of(users)) for launch, users in found.items()]
    if target.is_amd and Path.BF16 in paths and "minimax-m3" in shapes:
        call = Call(target, Path.BF16, WeightFormat.DENSE, "bf16", "minimax-m3", Combine.DETERMINISTIC, 256)
        seed = launches_of(target, lambda: launch_two_tiles(SHAPES[call.shape], call.tokens))
        jobs += [Job(launch, KernelUse.of([call]), compare=True) for launch in seed]
    return jobs


def compile_job(job: Job, folder: pathlib.Path | None, mca: str | None) -> Kernel | Broken:
    """Compile and read one kernel."""
    from epfuse.aot.kernels import build
    from epfuse.errors import EpfuseError

    try:
        return build(job.launch, job.use, folder, mca)
    except EpfuseError:
        raise
    except Exception as error:  # whatever the compiler raises is the finding
        return Broken(job, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
