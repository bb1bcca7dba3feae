"""What a check found, and all of it: the form of ``epfuse doctor --json``."""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field


class Verdict(enum.Enum):
    """How a line is to be read."""

    GOOD = "good"
    WARNING = "warning"
    """It works, but slower, with less, or not as one may think."""
    BAD = "bad"
    """Something that this machine is there for does not work."""


class Finding(BaseModel):
    """One line.

    Attributes:
        name: what was looked at.
        verdict: how it is.
        found: what was found, in a sentence or less.
        fix: what to do about it; None where nothing is to be done.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    verdict: Verdict
    found: Annotated[str, Field(min_length=1)]
    fix: str | None = None


class Diagnosis(BaseModel):
    """All lines, in the order of the checks.

    Attributes:
        schema_version: 1.
        epfuse: its version.
        findings: one for each check.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    epfuse: str
    findings: tuple[Finding, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether nothing is bad; a warning is not."""
        return self.count(Verdict.BAD) == 0

    def count(self, verdict: Verdict) -> int:
        """How many lines have that verdict."""
        return sum(finding.verdict is verdict for finding in self.findings)


Answer = tuple[Verdict, str, str | None]
"""What a check returns: verdict, found, fix."""


def good(found: str) -> Answer:
    """Nothing is to be done."""
    return Verdict.GOOD, found, None


def warning(found: str, fix: str) -> Answer:
    """It works, but not as one may think."""
    return Verdict.WARNING, found, fix


def bad(found: str, fix: str) -> Answer:
    """It does not work."""
    return Verdict.BAD, found, fix
