"""What a point's folder says while its job runs, and after it died."""

from __future__ import annotations

from epfuse.serving.journal import AT_WORK, PointState
from epfuse.serving.layout import PointFolder

LONGEST_PHASE = 64
LAST_BYTES = 2000
LAST_CHARACTERS = 200


def phase_of(point: PointFolder) -> PointState:
    """Where the job that holds the point is; a claim without a phase has just begun."""
    try:
        with (point.running / "phase").open("rb") as file:
            phase = PointState(file.read(LONGEST_PHASE).decode().strip())
    except (OSError, ValueError):
        return PointState.STARTING
    return phase if phase in AT_WORK else PointState.STARTING


def last_words(point: PointFolder, key: str) -> str:
    """The last line of an attempt's log, for the reason of a failure; empty if there is none."""
    try:
        with point.attempt(key).job_log.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - LAST_BYTES))
            lines = [line.strip() for line in log.read(LAST_BYTES).decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line[-LAST_CHARACTERS:] for line in reversed(lines) if line), "")
