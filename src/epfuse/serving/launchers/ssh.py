"""Jobs on a list of hosts without Slurm, one a host at a time, through the user's own ssh.

The hosts see the run's folder under the same path and have epfuse in the same interpreter (``--python``). No password
is ever asked for. An ssh that fails says nothing of the job: its answer is a doubt.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epfuse.errors import ConfigError
from epfuse.serving.launchers import commands
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

SECONDS = 60.0
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.@:-]*[A-Za-z0-9_])?")
OPTIONS = ("-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=10", "-oServerAliveCountMax=3")


@dataclass(frozen=True)
class SshLauncher:
    """Hosts that take one job each.

    Attributes:
        hosts: as ssh takes them: ``node1``, ``user@node2``.
        python: the interpreter there.

    Raises:
        ConfigError: a host is none, e.g. an option of ssh, or occurs twice.
    """

    hosts: tuple[str, ...]
    python: str
    name: str = "ssh"

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ConfigError("launcher is 'ssh', but there are no hosts; name some with --host")
        for host in self.hosts:
            if not HOST.fullmatch(host):
                raise ConfigError(f"host is {host!r}; it must be a name, an address or user@name")
        if len(set(self.hosts)) != len(self.hosts):
            raise ConfigError(f"a host occurs twice in {', '.join(self.hosts)}")

    @property
    def places(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.hosts, 1)

    def patience(self) -> float:
        """Beyond what an ssh whose connection broke may still do there."""
        return SECONDS

    def submit(self, order: Order, place: str) -> Accepted | Rejected | Unsure:
        """Start it there, or find it running there."""
        answer = self._ask(place, "start", order.key, str(order.folder), json.dumps(order.argv))
        if isinstance(answer, str):
            return Unsure(answer)
        pid = answer.get("pid")
        return Accepted(str(pid)) if isinstance(pid, int) else Unsure(f"ssh {place} answered {str(answer)[:80]!r}")

    def look(self, place: str, keys: Sequence[str]) -> CleanLook | Unreachable:
        """The host's processes that have one of the keys in their command line."""
        answer = self._ask(place, "look", *keys)
        if isinstance(answer, str):
            return Unreachable(answer)
        jobs = answer.get("jobs")
        if not isinstance(jobs, dict) or set(jobs) != set(keys) or not all(isinstance(p, list) for p in jobs.values()):
            return Unreachable(f"ssh {place} answered {str(answer)[:80]!r}")
        return CleanLook(
            tuple(Sighting(key, str(pid), JobPhase.RUNNING, "RUNNING") for key in keys for pid in jobs[key])
        )

    def probe(self, place: str) -> str | None:
        """``ssh HOST true``."""
        reply = self._ssh(place, ["true"])
        return None if reply.code == 0 else f"ssh {place}: {reply.words}"

    def cancel(self, place: str, key: str) -> str | None:
        """SIGTERM there, then SIGKILL."""
        answer = self._ask(place, "stop", key)
        return answer if isinstance(answer, str) else None

    def _ask(self, place: str, *words: str) -> dict[str, Any] | str:
        """What `processes` there says; a text where it can't be known."""
        reply = self._ssh(place, [self.python, "-m", "epfuse.serving.launchers.processes", *words])
        if reply.code != 0:
            return f"ssh {place}: {reply.words}"
        try:  # what a login prints comes before
            answer = json.loads(reply.out.strip().splitlines()[-1])
        except (ValueError, IndexError, RecursionError):
            answer = None
        return answer if isinstance(answer, dict) else f"ssh {place} answered {reply.out.strip()[:80]!r}"

    @staticmethod
    def _ssh(place: str, words: Sequence[str]) -> commands.Reply:
        """One word, quoted: ssh joins words with spaces, and a shell there reads them."""
        try:
            return commands.run(["ssh", *OPTIONS, "--", place, shlex.join(words)], SECONDS)
        except FileNotFoundError:
            raise ConfigError("launcher is 'ssh', but ssh is not installed here, or not in PATH") from None
