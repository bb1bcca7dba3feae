"""One server's part of a point: started, gated, measured, traced, ended."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epfuse.errors import EpfuseError
from epfuse.report.write import write_atomic
from epfuse.serving import evals, gate, load, trace
from epfuse.serving.client import run_client
from epfuse.serving.done import GateResult
from epfuse.serving.environments import Task, prepare
from epfuse.serving.layout import AttemptFolder, LegFolder
from epfuse.serving.node import Gpus, Sampler
from epfuse.serving.point import Arm, Image, PointJob, PutIn, Venv
from epfuse.serving.server import Server, ServerFault, port_is_free
from epfuse.serving.watch import ServerWatch

MOST_NOISE = 0.2
"""Nats a token. A baseline that differs from itself by more in the mean would let any candidate pass."""
AT_ONCE = 8
"""Texts of the gate that a server gets together; one by one and together, its kernels see other shapes."""
RUNS, LEAVES = "epfuse runs experts in place of", "epfuse leaves experts to"
"""What the plugin says in vLLM's log, once a worker."""
OURS = Path(__file__).resolve().parents[2]
"""The folder that has the running epfuse in it."""


class GatedOut(EpfuseError):
    """The server answers wrongly, or nobody can tell: its speed does not count.

    Fix: read the answers beside the point; then ``epfuse serve resume --again``.
    """

    def __init__(self, result: GateResult) -> None:
        super().__init__(result.reason)
        self.result = result


@dataclass
class LegFindings:
    """What a leg has found so far."""

    metrics: dict[str, float] = field(default_factory=dict)
    gate: GateResult | None = None
    notes: list[str] = field(default_factory=list)


class LegRunner:
    """Runs the legs of one attempt.

    Args:
        job: the point.
        attempt: the attempt's folder; it exists.
        watch: called all the time.
        plugins: arm -> the folder that its PYTHONPATH gets; arms that need none are not in it.
    """

    def __init__(self, job: PointJob, attempt: AttemptFolder, watch: ServerWatch, plugins: dict[str, Path]) -> None:
        self._job = job
        self._attempt = attempt
        self._watch = watch
        self._plugins = plugins
        self._gpus = Gpus(job.gpu_vendor if job.gpus else "none")
        self._reference: gate.Reference | None = None

    @property
    def gpus(self) -> Gpus:
        """The node's, as the vendor's tool shows them."""
        return self._gpus

    def run(self, number: int, arm: Arm, found: LegFindings) -> None:
        """One leg, from a free port to a stopped server.

        Args:
            number: of the leg, from 1.
            arm: what to serve.
            found: filled on the way, so that what a failing leg found is kept.

        Raises:
            GatedOut: the gate did not pass.
            ServerFault, LoadFault, Ended, Revoked: what else ended it.
        """
        leg = self._attempt.leg(number, arm.name)
        leg.path.mkdir()
        self._watch.note("starting")
        self._wait_free()
        traces = leg.path / "traces"
        mark = secrets.token_hex(16)
        with self._patched(arm, leg), self._served(arm, leg, traces, mark) as server:
            self._check_plugin(arm, leg, found)
            self._watch.note("warming")
            with Sampler(self._gpus, leg.gpu_samples, self._job.polls.gpu):
                self._gate(arm, server, leg, found)
                self._evals(arm, server, leg, found)
                if not self._job.point.eval_only:
                    self._watch.note("running")
                    self._load(arm, server, leg, found)
            if self._job.profile:
                try:
                    with self._watch.phase("the trace", trace.TRACE_PATIENCE + trace.PROFILE_PATIENCE):
                        port, model, client = self._job.port, self._job.point.model, self._job.client
                        server.during(lambda: trace.take(port, model, client, traces, leg), self._watch)
                except trace.TraceFault as fault:
                    found.notes.append(f"no trace: {fault}")

    def task(self, arm: Arm, argv: Sequence[str], name: str) -> Task:
        """A command in an arm's environment, with its variables and its epfuse."""
        settings = dict(arm.server.env)
        plugin = self._plugins.get(arm.name)
        if plugin is not None:
            settings["PYTHONPATH"] = ":".join(filter(None, (str(plugin), settings.get("PYTHONPATH"))))
        return prepare(
            arm.environment,
            tuple(argv),
            settings,
            name=name,
            folders=(self._attempt.path.absolute(),),
            gpus=self._job.gpus,
            vendor=self._job.gpu_vendor,
        )

    def _wait_free(self) -> None:
        port = self._job.port
        with self._watch.phase("waiting for a free port and free GPUs", self._job.deadlines.free + 60):
            end = time.monotonic() + self._job.deadlines.free
            while True:
                busy = self._gpus.busy()
                if port_is_free(port) and not busy:
                    return
                if time.monotonic() > end:
                    what = f"GPUs {busy} hold memory of another process" if busy else f"port {port} is taken"
                    raise ServerFault(f"{what} for {self._job.deadlines.free:.0f} s: no server was started")
                self._watch()
                time.sleep(self._job.polls.watch)

    @contextlib.contextmanager
    def _served(self, arm: Arm, leg: LegFolder, traces: Path, mark: str) -> Iterator[Server]:
        job = self._job
        argv = [part.replace("{port}", str(job.port)) for part in arm.server.argv]
        if job.profile and "serve" in argv[1:2]:
            argv += trace.server_arguments(traces)
        if arm.epfuse is PutIn.PATCH and isinstance(arm.environment, Image):  # the container is new, its vLLM unpatched
            argv = ["python3", "-m", "epfuse.serving.patched", *argv]
        task = self.task(arm, argv, f"epfuse-{mark[:16]}")
        write_atomic(leg.path / "command.json", json.dumps({"argv": task.argv, "env": dict(arm.server.env)}, indent=2))
        self._watch()  # the claim, right before the server starts
        server = Server(task, leg.server_log, job.port, mark, fatal=job.fatal, look=job.polls.watch)
        try:
            with self._watch.phase("the server's start", job.deadlines.ready + 60):
                server.wait_ready(job.deadlines.ready, job.point.model, self._watch)
            yield server
        finally:
            server.stop(job.deadlines.stop)

    @contextlib.contextmanager
    def _patched(self, arm: Arm, leg: LegFolder) -> Iterator[None]:
        """In a virtual environment the patch is taken back: the next arm may be without it."""
        if arm.epfuse is not PutIn.PATCH or isinstance(arm.environment, Image):
            yield
            return

        def patch(verb: str, look: Callable[[], None]) -> None:
            task = self.task(arm, ("python", "-m", "epfuse", "vllm", "patch", verb), "")
            run_client(task, leg.path / "patch.log", f"vllm patch {verb}", look, self._job.polls.watch)

        patch("apply", self._watch)
        try:
            yield
        finally:
            patch("revert", lambda: None)  # whatever ended the leg

    def _run(self, task: Task, log: Path, what: str, server: Server) -> None:
        """Run a command to its end, beside a server that is looked at meanwhile."""

        def look() -> None:
            self._watch()
            server.check()

        run_client(task, log, what, look, self._job.polls.watch)

    def _check_plugin(self, arm: Arm, leg: LegFolder, found: LegFindings) -> None:
        """Whether the arm runs what it says: or a comparison would compare a thing with itself."""
        text = leg.server_log.read_text(errors="replace")
        runs = RUNS in text
        if arm.epfuse is PutIn.NOT and runs:
            raise ServerFault(f"arm {arm.name} is without epfuse, but its log says '{RUNS} ...'")
        if arm.epfuse is not PutIn.NOT and not runs:
            if LEAVES not in text:
                raise ServerFault(f"arm {arm.name} is with epfuse, but no worker's log says that it runs experts")
            found.notes.append("epfuse left the experts to vLLM")

    def _gate(self, arm: Arm, server: Server, leg: LegFolder, found: LegFindings) -> None:
        wanted = self._job.gate
        if not wanted.prompts:
            return
        baseline = arm.name == self._job.arms[0].name
        first = self._reference is None
        if first and not baseline:
            raise ServerFault(f"arm {arm.name} comes before the baseline {self._job.arms[0].name}: nothing to gate by")
        port, model, patience = self._job.port, self._job.point.model, self._job.deadlines.gate
        ways = [1, *[AT_ONCE] * (wanted.repeats if first else 1)]

        def readings() -> list[gate.Reading]:
            return [gate.read(port, model, wanted, at_once, patience) for at_once in ways]

        try:
            with self._watch.phase("the gate", patience):
                taken = server.during(readings, self._watch)
            if self._reference is None:
                self._reference = gate.reference_of(taken)
                result = own_result(self._reference)
            else:
                results = [gate.judge(reading, self._reference, wanted) for reading in taken]
                result = min(results, key=lambda one: (one.passed, -(one.difference or 0.0)))
        except gate.GateFault as fault:
            taken, result = [], GateResult(passed=False, reason=str(fault))
        found.gate = result
        content = {"result": result.model_dump(), "readings": [vars(reading) for reading in taken]}
        write_atomic(leg.gate, json.dumps(content))
        if not result.passed:
            raise GatedOut(result)

    def _evals(self, arm: Arm, server: Server, leg: LegFolder, found: LegFindings) -> None:
        job = self._job
        if not (job.point.is_eval and job.gate.evals):
            return
        folder = leg.path / "evals"
        folder.mkdir()
        argv = evals.eval_command(job.gate, job.point.model, job.host, job.port, job.client.concurrency, folder)
        log = leg.path / "evals.log"
        broken = ""
        with self._watch.phase("the evals", job.deadlines.evals):
            try:
                self._run(self.task(arm, argv, f"epfuse-{secrets.token_hex(8)}"), log, "the evals", server)
            except load.LoadFault as fault:
                broken = str(fault)
        values, reason = evals.read_evals(job.gate, folder)
        reason = broken or reason
        before = found.gate or GateResult(passed=True, reason="")
        words = "; ".join(filter(None, (before.reason, reason or "evals passed")))
        found.gate = before.model_copy(update={"passed": not reason, "reason": words, "evals": values})
        if reason:
            raise GatedOut(found.gate)

    def _load(self, arm: Arm, server: Server, leg: LegFolder, found: LegFindings) -> None:
        job = self._job
        argv = load.load_command(job.client, job.point.model, job.host, job.port, leg.result.absolute())
        task = self.task(arm, argv, f"epfuse-{secrets.token_hex(8)}")
        if job.client.tool == "builtin":  # it belongs to this epfuse, whatever the arm runs in
            task = prepare(Venv(), argv, {"PYTHONPATH": str(OURS)}, name="", folders=(), gpus=0, vendor="none")
        with self._watch.phase("the load", job.deadlines.warmup + job.deadlines.load):
            self._run(task, leg.client_log, "the load", server)
        found.metrics = load.read_result(job.client, leg.result)


def own_result(reference: gate.Reference) -> GateResult:
    """The baseline's: it can only fail by not repeating itself."""
    noise = reference.noise.mean
    words = f"the baseline differs from itself by {noise:.4f} nats a token in the mean (allowed {MOST_NOISE})"
    return GateResult(passed=noise <= MOST_NOISE, reason=words, difference=noise, allowed=MOST_NOISE)
