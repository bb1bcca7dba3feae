"""Slurm, by sbatch, squeue, sacct, scancel and scontrol, as they really answer.

A submission that got no clear answer is a doubt, never a failure: a frozen controller takes the job when it wakes up.
Jobs are found by their name, which is the attempt's key, never by their number: a controller that lost its last seconds
gives the same number again.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import tenacity

from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic
from epfuse.serving.launchers import commands
from epfuse.serving.launchers.commands import Reply
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
from epfuse.serving.point import Slurm as Options

PLACE = "slurm"
COMMAND_SECONDS = 120.0
"""Patience with one command; with Slurm's own MessageTimeout of 10 s they give up earlier."""
UNKNOWN_PATIENCE = 61.0
"""Seconds, where the cluster's MessageTimeout (10 s by default) is not known."""
LOOK = "%i|%j|%T|%r"

FINAL = (
    "Invalid partition name specified",
    "Invalid account or account/partition combination specified",
    "Invalid qos specification",
    "Invalid feature specification",
    "Invalid generic resource (gres) specification",
    "Invalid node name specified",
    "Invalid job credential",
    "Requested time limit is invalid",
    "Requested node configuration is not available",
    "User's group not permitted to use this partition",
    "More processors requested than permitted",
    "Unable to open file",
    "This does not look like a batch script",
    "unrecognized option",
    "option requires an argument",
    "invalid option",
)
"""What sbatch says of an order that it will refuse each time."""

MARGIN_MINUTES = 10
MOST_NAMES = 500
"""Keys in one question: Linux takes no argument of 128 KiB, and a key has up to 200 characters."""
NO_ACCOUNTING = "Slurm accounting storage is disabled"
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED", "RESIZING"}
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
# what a user's profile may preset; options that we give win over it, others (an array, a format) would change a meaning
KEPT = {"SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION", "SBATCH_CONSTRAINT"}
PRESETS = re.compile(r"(SBATCH|SQUEUE|SCANCEL|SACCT)_")


@dataclass
class SlurmLauncher:
    """One cluster, as the user who runs the dispatcher sees it.

    Attributes:
        options: what sbatch is told beyond the job itself.
        sleep: waits between two tries of a look; tests hand in their own.
    """

    options: Options = field(default_factory=Options)
    sleep: Callable[[float], None] = tenacity.nap.sleep
    name: str = "slurm"
    _message_timeout: float | None = field(default=None, init=False)

    @property
    def places(self) -> Mapping[str, int | None]:
        return {PLACE: None}

    def submit(self, order: Order, place: str) -> Accepted | Rejected | Unsure:
        """One sbatch. Only "accepted" and texts that are final are an answer; all else leaves a doubt."""
        script = order.folder / "batch.sh"
        write_atomic(script, batch_script(order.argv))
        reply = self._run(self._sbatch(order, str(script)))
        if reply.code == 0:
            found = re.fullmatch(r"([1-9][0-9]*)(;\S+)?", reply.out.strip())
            return Accepted(found[1]) if found else Unsure(f"sbatch answered {reply.out.strip()[:80]!r}")
        final = next((text for text in FINAL if text in reply.err), None)
        return Unsure(f"sbatch: {reply.words}") if final is None else Rejected(f"sbatch: {reply.words}")

    def look(self, place: str, keys: Sequence[str]) -> CleanLook | Unreachable:
        """Ask squeue and, where there is accounting, sacct: only with both answers it is a look.

        What is active, only squeue says: a job that a killed controller lost stays PENDING in the accounting for ever.
        """
        if (down := self.probe(place)) is not None:
            return Unreachable(down)
        seen: list[Sighting] = []
        for first in range(0, len(keys), MOST_NAMES):
            part = self._look_for(keys[first : first + MOST_NAMES])
            if isinstance(part, Unreachable):
                return part
            seen += part.jobs
        return CleanLook(tuple(seen))

    def _look_for(self, keys: Sequence[str]) -> CleanLook | Unreachable:
        names = ",".join(keys)
        reply = self._ask(["squeue", "-h", "-a", "-t", "all", "--me", f"--name={names}", "-o", LOOK])
        if reply.code != 0:
            return Unreachable(f"squeue: {reply.words}")
        queue = _sightings(reply.out, keys)
        if queue is None:
            return Unreachable(f"squeue answered {reply.out.strip()[:80]!r}")
        # from the epoch: sacct alone begins today at midnight
        times = ["-S", "1970-01-01"]
        reply = self._ask(["sacct", "-n", "-P", "-X", f"--name={names}", *times, "-o", "JobID,JobName,State,Reason"])
        if reply.code == 0:
            known = {(job.key, job.job) for job in queue}
            past = _sightings(reply.out, keys)
            if past is None:
                return Unreachable(f"sacct answered {reply.out.strip()[:80]!r}")
            ended = (job for job in past if job.phase is JobPhase.ENDED and (job.key, job.job) not in known)
            return CleanLook((*queue, *ended))
        return CleanLook(tuple(queue)) if NO_ACCOUNTING in reply.err else Unreachable(f"sacct: {reply.words}")

    def probe(self, place: str) -> str | None:
        """``scontrol ping``, which knows at once where sbatch waits for its time-out."""
        reply = self._run(["scontrol", "ping"])
        if reply.code == 0 and re.search(r"\bis UP\b", reply.out):
            return None
        down = re.search(r"^.*\bis DOWN\b.*$", reply.out, re.MULTILINE)
        return f"the controller does not answer: {down[0] if down else reply.words}"

    def cancel(self, place: str, key: str) -> str | None:
        """``scancel`` by name: it says nothing of a job that is not there, and nothing of one that does not end."""
        reply = self._ask(["scancel", "--me", f"--name={key}"])
        return None if reply.code == 0 else f"scancel: {reply.words}"

    def patience(self) -> float:
        """Beyond MessageTimeout, in which an sbatch that gave up may still be on its way."""
        if self._message_timeout is None:
            reply = self._run(["scontrol", "show", "config"])
            found = re.search(r"^MessageTimeout\s*=\s*([0-9]+) sec", reply.out, re.MULTILINE)
            if reply.code != 0 or found is None:
                return UNKNOWN_PATIENCE
            self._message_timeout = float(found[1])
        return 1.5 * self._message_timeout + 1.0

    def _sbatch(self, order: Order, script: str) -> list[str]:
        options = self.options
        asked = {
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "constraint": options.constraint,
            "nodelist": order.node or options.nodelist,
            "gres": options.gres,
            "cpus-per-task": options.cpus,
            # minutes, and some for the job to stop its server by itself
            "time": None if order.seconds is None else math.ceil(order.seconds / 60) + MARGIN_MINUTES,
        }
        # the user's own arguments come first: of two, sbatch takes the later one, and these must be ours
        argv = ["sbatch", *options.arguments]
        argv += [f"--{name}={value}" for name, value in asked.items() if value is not None]
        if options.exclusive:
            argv.append("--exclusive")
        argv += ["--parsable", "-N", "1", "-n", "1", "-J", order.key, f"--comment={order.key}", "--no-requeue"]
        argv += ["--dependency=singleton", "--open-mode=append", "-o", str(order.folder / "job.log").replace("%", "%%")]
        return [*argv, script]

    def _ask(self, argv: list[str]) -> Reply:
        """A command that changes nothing, or no more the second time: tried thrice, a little apart."""
        asking = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(30),
            wait=tenacity.wait_exponential(multiplier=0.5, max=5) + tenacity.wait_random(0, 1),
            retry=tenacity.retry_if_result(lambda reply: reply.code != 0 and NO_ACCOUNTING not in reply.err),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome is not None else None,
            sleep=self.sleep,
        )
        reply: Reply = asking(self._run, argv)
        return reply

    @staticmethod
    def _run(argv: list[str]) -> Reply:
        kept = {name: value for name, value in os.environ.items() if name in KEPT or not PRESETS.match(name)}
        try:
            return commands.run(argv, COMMAND_SECONDS, kept | {"LC_ALL": "C"})
        except FileNotFoundError:
            raise ConfigError(f"launcher is 'slurm', but {argv[0]} is not installed here, or not in PATH") from None


def batch_script(argv: Sequence[str]) -> str:
    """What sbatch is given. ``exec``: Slurm's signals reach the job itself.

    Raises:
        ConfigError: an argument has a character that a line of a script can't have.
    """
    if bad := [word for word in argv if re.search(r"[\x00-\x1f\x7f]", word)]:
        raise ConfigError(f"the job's command has {bad[0]!r}; control characters can't be in it")
    return f"#!/bin/bash\nexec {shlex.join(argv)}\n"


def _sightings(text: str, keys: Sequence[str]) -> list[Sighting] | None:
    """Jobs in lines of ``number|name|state|reason``; None if a line is none, so the answer is torn."""
    found = []
    for line in text.splitlines():
        number, name, state, why = (line.split("|", 3) + [""] * 4)[:4]
        word = (state.split() or [""])[0].rstrip("+")  # "CANCELLED by 1000"
        if not re.fullmatch(r"[1-9][0-9_+.\[\]-]*", number) or not word:
            return None
        if name in keys:
            phase = JobPhase.RUNNING if word in RUNNING else JobPhase.WAITING if word in WAITING else JobPhase.ENDED
            found.append(Sighting(name, number, phase, word, "" if why in ("None", "") else why))
    return found
