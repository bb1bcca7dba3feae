"""What ``epfuse profile`` said of a leg's trace, and the table of phases over points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_object
from epfuse.profiling.text import printable

LARGEST_PROFILE = 1 << 28
"""Bytes."""
UNCLASSIFIED = "unclassified"
Microseconds = Annotated[FiniteFloat, Field(ge=0, le=1e12)]


class _Part(BaseModel):
    """Of a profile, as much as is read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Kernels(_Part):
    calls: Annotated[int, Field(ge=0, le=1 << 40)]
    us: Microseconds


class _Phase(_Kernels):
    name: Annotated[str, Field(min_length=1, max_length=200)]


class _Profile(_Part):
    window: Annotated[list[int], Field(min_length=1, max_length=1 << 20)]
    phases: Annotated[list[_Phase], Field(max_length=200)]
    unclassified: list[_Kernels]


@dataclass(frozen=True)
class StepPhase:
    """Kernels of a kind, in one step of the window; means over its steps.

    Attributes:
        ms: of the device; kernels that ran at the same time count twice.
    """

    name: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Phases:
    """A trace's window.

    Attributes:
        steps: in it.
        phases: in the order of a step; what no rule knows is the last one, if there is any.
    """

    steps: int
    phases: tuple[StepPhase, ...]

    @property
    def ms(self) -> float:
        """Of all kernels in a step."""
        return sum(phase.ms for phase in self.phases)


@dataclass(frozen=True)
class PhaseRow:
    """A phase, and what it is in each column; None: it isn't there."""

    name: str
    cells: list[StepPhase | None]


def read_phases(path: Path) -> Phases:
    """A leg's profile.

    Args:
        path: of what ``epfuse profile --json`` wrote.

    Raises:
        ConfigError: it can't be read, is torn, or has other values than it must have; the message names file and key.
    """
    try:
        found = _Profile.model_validate(read_object(path, "profile", LARGEST_PROFILE))
    except ValidationError as error:
        where, fault = first_fault(error, "the file")
        raise ConfigError(f"profile {path}: {where}: {fault}") from None
    steps = len(found.window)
    kinds = [(printable(phase.name), phase.calls, phase.us) for phase in found.phases]
    if found.unclassified:
        unknown = found.unclassified
        kinds.append((UNCLASSIFIED, sum(each.calls for each in unknown), sum(each.us for each in unknown)))
    return Phases(steps, tuple(StepPhase(name, calls / steps, us / steps / 1e3) for name, calls, us in kinds))


def phase_table(columns: Sequence[Phases]) -> list[PhaseRow]:
    """Phases over points: a row for each phase that any of them has.

    Args:
        columns: a point's or an arm's.
    """
    known = [{phase.name: phase for phase in column.phases} for column in columns]
    names = dict.fromkeys(name for column in known for name in column if name != UNCLASSIFIED)
    if any(UNCLASSIFIED in column for column in known):
        names[UNCLASSIFIED] = None
    return [PhaseRow(name, [column.get(name) for column in known]) for name in names]
