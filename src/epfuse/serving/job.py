"""``python -m epfuse.serving.job POINT_FOLDER --key K``: one point, on this node, by what its ``point.json`` says.

Whoever starts it, and however often: the first copy of the attempt that claims the point runs it, every other one ends
with 0 and touches nothing. ``done.json`` is written last, and only by who still holds the claim then.

Exit codes: 0 the point is done, or somebody else's; 1 it failed or was gated out, which ``done.json`` says too, or the
claim was taken away; 2 there is no such point, or its end could not be written; 70 a bug of epfuse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from epfuse import __version__
from epfuse.cli.exits import exit_code
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic
from epfuse.serving import plugin
from epfuse.serving.claim import Claim, Revoked
from epfuse.serving.done import Done, End, Leg
from epfuse.serving.layout import PointFolder, attempt_of, read_model
from epfuse.serving.leg import GatedOut, LegFindings, LegRunner
from epfuse.serving.node import answer, facts
from epfuse.serving.point import Arm, Image, PointJob, PutIn
from epfuse.serving.watch import ServerWatch

PACKAGES = (
    "import importlib.metadata as m, json, sys;"
    "print(json.dumps({'python': sys.version.split()[0], **{d.name: d.version for d in m.distributions() if d.name}}))"
)


def run(folder: PointFolder, key: str) -> int:
    """Run a point, if nobody else does or did.

    Args:
        folder: the point's; it has ``point.json``.
        key: of this attempt.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such point, it can't be read, or the key is another's.
        OSError: its end can't be written.
    """
    job = read_model(folder.job, PointJob, "point")
    attempt_of(key, job.run, job.point.name)
    if folder.done.exists():
        return _say(f"{job.point.name} has ended already", 0)
    claim = Claim.take(folder.path, key)
    if claim is None:
        return _say(f"{job.point.name} is somebody else's", 0)
    if folder.done.exists():  # it ended between the two looks
        return _say(f"{job.point.name} has ended already", 0)
    watch = ServerWatch(claim, job.deadlines.job)
    with watch.signals():
        try:
            done = _Attempt(folder, job, key, watch).run()
            claim.publish(f"{done.model_dump_json(by_alias=True, indent=2)}\n".encode(), folder.done)
        except Revoked as revoked:
            return _say(f"{revoked}; what it measured counts for nothing", 1)
    words = f"{done.name}: {done.state.value}{f': {done.reason}' if done.reason else ''}"
    return _say(words, 0 if done.state is End.DONE else 1)


class _Attempt:
    """One attempt at a point, from its first file to its end."""

    def __init__(self, folder: PointFolder, job: PointJob, key: str, watch: ServerWatch) -> None:
        self._folder = folder
        self._job = job
        self._key = key
        self._watch = watch
        self._attempt = folder.attempt(key)
        self._legs: list[Leg] = []

    def run(self) -> Done:
        """The end of the point, whatever happens but a lost claim.

        Raises:
            Revoked: the claim is lost.
        """
        started = time.time()
        state, reason = End.DONE, ""
        try:
            self._attempt.path.mkdir(parents=True, exist_ok=True)
            self._run_legs()
            reason = "; ".join(dict.fromkeys(leg.reason for leg in self._legs if leg.reason))
        except Revoked:
            raise
        except GatedOut as out:
            state, reason = End.GATED_OUT, str(out)
        except Exception as error:
            state, reason = End.FAILED, _sentence(error)
        return Done(
            name=self._job.point.name,
            key=self._key,
            state=state,
            reason=reason,
            node=socket.gethostname(),
            started=started,
            ended=max(started, time.time()),
            legs=tuple(self._legs),
        )

    def _run_legs(self) -> None:
        job = self._job
        missing = [need for need in job.needs if not Path(need).exists()]
        if missing:
            raise ConfigError(f"this node lacks {', '.join(missing)}, which the point needs")
        plugins = self._place_plugins()
        runner = LegRunner(job, self._attempt, self._watch, {name: path for name, (path, _) in plugins.items()})
        self._write_versions(runner, {name: digest for name, (_, digest) in plugins.items()})
        for number, name in enumerate(job.order, start=1):
            self._run_leg(runner, number, job.arm(name))

    def _run_leg(self, runner: LegRunner, number: int, arm: Arm) -> None:
        started, found = time.time(), LegFindings()
        state, reason = End.DONE, ""
        _say(f"leg {number} of {len(self._job.order)}: {arm.name}", 0)
        try:
            runner.run(number, arm, found)
        except Revoked:
            raise
        except GatedOut as out:
            state, reason = End.GATED_OUT, str(out)
            raise
        except Exception as error:
            state, reason = End.FAILED, _sentence(error)
            raise
        finally:
            counts = state is End.DONE
            leg = Leg(
                number=number,
                arm=arm.name,
                folder=str(self._attempt.leg(number, arm.name).path.relative_to(self._folder.path)),
                state=state,
                reason=reason or "; ".join(found.notes),
                started=started,
                ended=max(started, time.time()),
                metrics=found.metrics if counts else {},
                gate=found.gate,
            )
            self._legs.append(leg)

    def _place_plugins(self) -> dict[str, tuple[Path, str]]:
        """Arm -> folder for its PYTHONPATH, and the hash of what lies there."""
        placed = {}
        for arm in self._job.arms:
            if arm.epfuse is not PutIn.NOT and arm.epfuse_source is not None:
                folder = (self._attempt.path / f"plugin-{arm.name}").absolute()
                placed[arm.name] = (folder, plugin.place(Path(arm.epfuse_source), folder, arm.epfuse))
        return placed

    def _write_versions(self, runner: LegRunner, plugins: dict[str, str]) -> None:
        """What ran: the node, and each arm's packages, image and plugin."""
        arms: dict[str, Any] = {}
        for arm in self._job.arms:
            self._watch()
            task = runner.task(arm, ("python3", "-c", PACKAGES), f"epfuse-{self._key}-{arm.name}"[:60])
            printed = answer(task.argv, task.environment)
            try:
                packages = json.loads(printed.splitlines()[-1])
            except (ValueError, IndexError):
                packages = {"(unknown)": printed}
            arms[arm.name] = {
                "packages": packages,
                "image": _image(arm.environment) if isinstance(arm.environment, Image) else None,
                "plugin_sha256": plugins.get(arm.name),
            }
        content = {"epfuse": __version__, **facts(runner.gpus), "label": self._job.label, "arms": arms}
        write_atomic(self._attempt.versions, json.dumps(content, indent=2))


def _image(image: Image) -> dict[str, str]:
    """An image's name and what is known of its content."""
    known = {"reference": image.reference, "engine": image.engine}
    if image.engine in ("docker", "podman"):
        argv = (image.engine, "image", "inspect", "--format", "{{.Id}} {{.RepoDigests}}", image.reference)
        return known | {"digest": answer(argv, {"PATH": "/usr/local/bin:/usr/bin:/bin"})}
    file = Path(image.reference)
    if file.is_file():
        import hashlib

        with file.open("rb") as content:
            return known | {"digest": f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"}
    return known | {"digest": "(the engine shows none; name the image by its digest)"}


def _sentence(error: Exception) -> str:
    """What to say of an error; one that is none of ours by its kind too."""
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _say(words: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr, flush=True)
    return int(code)


def main(arguments: list[str]) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m epfuse.serving.job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("point", type=Path, metavar="POINT_FOLDER")
    parser.add_argument("--key", required=True, help="of this attempt: run-point-attempt")
    options = parser.parse_args(arguments)
    return exit_code(lambda: sys.exit(run(PointFolder(options.point.absolute()), options.key)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
