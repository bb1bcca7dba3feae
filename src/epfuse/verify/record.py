"""What a run of the suite found, as data: the JSON record is the result, the table shows it."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from pydantic_core import to_jsonable_python

import epfuse
from epfuse.verify.budget import Difference, Tolerance
from epfuse.verify.problem import Problem

ORACLE = "float64"
"""In place of a path's name: the cases that compare the two oracles with each other."""


@dataclass
class CaseResult:
    """One scenario on one path, over all ranks.

    Attributes:
        name: the scenario.
        path: the path's name, or `ORACLE`.
        weights: the format that it read.
        combine: how it summed routes.
        tokens: T.
        tolerance: what had to be reached; None for a case that compares bits.
        snr_db: worst token of any rank and of the sum over ranks; ``inf`` if nothing differed.
        max_error: worst element, in root mean squares of its token's row.
        relative_error: worst rank's, or the sum's, norm of the error over that of the oracle.
        failures: what went wrong and on which rank; empty if the case passed.
    """

    name: str
    path: str
    weights: str
    combine: str
    tokens: int
    tolerance: Tolerance | None
    snr_db: float = math.inf
    max_error: float = 0.0
    relative_error: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check of the case passed."""
        return not self.failures

    def judge(self, difference: Difference, what: str) -> None:
        """Keep the worst figures and note a failure under the name ``what``."""
        self.snr_db = min(self.snr_db, difference.snr_db)
        self.max_error = max(self.max_error, difference.max_error)
        self.relative_error = max(self.relative_error, difference.relative_error)
        if self.tolerance is None or not difference.within(self.tolerance):
            self.failures.append(
                f"{what}: {difference.snr_db:.1f} dB, max error {difference.max_error:.2g}, relative error"
                f" {difference.relative_error:.2g}"
            )

    def to_json(self) -> dict[str, Any]:
        """A figure that is not finite becomes null."""
        values: dict[str, Any] = to_jsonable_python(self, inf_nan_mode="null")
        return values | {"ok": self.ok}


@dataclass(frozen=True)
class VerifyRecord:
    """One run of the suite."""

    problem: Problem
    cases: list[CaseResult]

    @property
    def ok(self) -> bool:
        """Whether every case passed."""
        return all(case.ok for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        problem = to_jsonable_python(self.problem, fallback=lambda value: str(value).removeprefix("torch."))
        problem["activation"] = {"kind": self.problem.activation.kind, **problem["activation"]}
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": describe_device(self.problem.device) | {"target": self.problem.target.value},
            "versions": versions(),
            "problem": problem,
            "cases": [case.to_json() for case in self.cases],
            "ok": self.ok,
        }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and memory of a GPU, or the machine's architecture."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": device.type, "name": properties.name, "memory_bytes": properties.total_memory}
    return {"type": device.type, "name": platform.machine(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not there."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:  # ROCm builds call it by another name
        triton = None
    return {
        "epfuse": epfuse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
