"""Jobs on the machine of the dispatcher, one at a time: they want the same GPUs."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epfuse.serving.launchers import processes
from epfuse.serving.launchers.launcher import (
    Accepted,
    CleanLook,
    JobPhase,
    Order,
    Rejected,
    Sighting,
    Unreachable,
    Unsure,
)


@dataclass(frozen=True)
class LocalLauncher:
    """Processes of this machine; of another machine's it knows nothing."""

    name: str = "local"

    @property
    def places(self) -> Mapping[str, int | None]:
        return {socket.gethostname(): 1}

    def patience(self) -> float:
        """A process is there or not; a little, for one that has ended and whose last file is on its way."""
        return 0.5

    def submit(self, order: Order, place: str) -> Accepted | Rejected | Unsure:
        """Start the process, or find it running."""
        try:
            return Accepted(str(processes.start(order.key, order.folder, order.argv)))
        except OSError as error:
            return Rejected(f"{order.argv[0]} can't be started: {error.strerror or error}")

    def look(self, place: str, keys: Sequence[str]) -> CleanLook | Unreachable:
        """All processes that have one of the keys in their command line."""
        if (lost := self.probe(place)) is not None:
            return Unreachable(lost)
        found = ((key, pid) for key in keys for pid in processes.running(key))
        return CleanLook(tuple(Sighting(key, str(pid), JobPhase.RUNNING, "RUNNING") for key, pid in found))

    def probe(self, place: str) -> str | None:
        """Whether this is the machine."""
        here = socket.gethostname()
        return None if place == here else f"its jobs are processes of {place}, this is {here}: resume the run there"

    def cancel(self, place: str, key: str) -> str | None:
        """SIGTERM, then SIGKILL."""
        if (lost := self.probe(place)) is not None:
            return lost
        processes.stop(key)
        return None
