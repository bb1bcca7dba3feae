"""What a run and a job are, as the files of a run's folder hold them (`epfuse.serving.layout`); `done` has the ends."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from epfuse.errors import MissingDependency

try:
    from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StringConstraints, model_validator
except ImportError as _missing:  # it is a core dependency, but a job may run in an image of somebody else's
    raise MissingDependency("'epfuse serve' needs pydantic: pip install 'epfuse[serve]'") from _missing

HEADROOM = 256
"""Tokens of --max-model-len beyond input and output."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$", max_length=80)]
"""Of a run, a point or an arm: part of file names and of a Slurm job's name."""
Key = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*-[1-9][0-9]*$", max_length=200)]
"""``run-point-attempt``: one submission, once and for all (`epfuse.serving.layout.make_key`)."""
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line: a path, an argument, an image's name."""
Operand = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*$")
]
"""A `Text` that stands in a command line by itself: no program may take it for an option."""
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Seconds = Annotated[FiniteFloat, Field(strict=True, gt=0, le=30 * 86400)]


class Frozen(BaseModel):
    """A value that is checked when it is made or read; a key that it does not know is an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class Point(Frozen):
    """One point of the matrix.

    Attributes:
        name: unique in a run.
        model: as ``vllm serve`` takes it: a name or a path.
        prefix: short name of the model in results.
        target: hardware, e.g. ``mi300x``.
        precision: of the checkpoint, e.g. ``fp8``.
        framework: that serves.
        isl, osl: longest input and output of a request, tokens.
        concurrency: requests in flight.
        tp: GPUs that share the attention, or hold a copy of it each (``dp_attention``).
        ep: ranks that share the experts; 1: none, each rank slices every expert.
        spec_decoding: ``none`` is all that recipes ship.
        is_eval: lm-eval runs at this point too.
        eval_only: it runs for lm-eval only and has no speed.
    """

    name: Name
    model: Operand
    prefix: Name
    target: Name
    precision: Name
    framework: Name = "vllm"
    isl: Count
    osl: Count
    concurrency: Count
    tp: Count
    ep: Count = 1
    dp_attention: bool = False
    spec_decoding: Literal["mtp", "draft_model", "none"] = "none"
    is_eval: bool = False
    eval_only: bool = False

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have in the server."""
        return self.isl + self.osl + HEADROOM


class Command(Frozen):
    """A program and what its environment has beyond the one that the job starts in. No shell reads it."""

    argv: Annotated[tuple[Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=1 << 16)], ...],
                    Field(min_length=1, max_length=1000)]  # fmt: skip
    env: dict[EnvName, Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=1 << 16)]] = {}


class Mount(Frozen):
    """A folder of the host that a container sees."""

    source: Text
    target: Text
    read_only: StrictBool = True


class Venv(Frozen):
    """Programs from a virtual environment.

    Attributes:
        path: its folder, whose ``bin`` comes first in PATH; None: the environment that the job itself runs in.
    """

    kind: Literal["venv"] = "venv"
    path: Text | None = None


class Image(Frozen):
    """Programs from an image.

    Attributes:
        engine: what starts it.
        reference: the image: a name with tag or digest, or a file that the engine takes.
        mounts: beside the job's own folder, which is always there: models, caches.
        shm_gib: of ``/dev/shm``.
    """

    kind: Literal["image"] = "image"
    engine: Literal["docker", "podman", "apptainer", "pyxis"]
    reference: Operand
    mounts: tuple[Mount, ...] = ()
    shm_gib: Count = 64


class PutIn(StrEnum):
    """How epfuse gets into an arm's vLLM."""

    NOT = "not"
    PLUGIN = "plugin"  # VLLM_PLUGINS names it
    PATCH = "patch"  # `epfuse vllm patch apply` before the start, where no plugin is loaded


class Arm(Frozen):
    """One of the things that a point compares; a run without a comparison has one.

    Attributes:
        name: ``baseline``, ``candidate`` or a recipe's own word.
        server: the command; ``{port}`` in an argument stands for `PointJob.port`.
        environment: where the command runs.
        epfuse: how epfuse gets into it.
        epfuse_source: a wheel or a folder to install at start (an image's copy is new each time); None: it is there.
    """

    name: Name
    server: Command
    environment: Annotated[Venv | Image, Field(discriminator="kind")] = Venv()
    epfuse: PutIn = PutIn.NOT
    epfuse_source: Text | None = None


class Client(Frozen):
    """The load of a point; InferenceX' fixed-seq-len settings are the defaults.

    Attributes:
        tool: ``vllm``: ``vllm bench serve``, ``guidellm``, or ``builtin``: our own, for servers without them.
        command: the program's first words, run in the arm's environment; None: the tool's own.
        prompts, concurrency, warmups: requests to measure, in flight, and before.
        shortest_share: lengths are drawn from [share x L, L], as InferenceX draws them (`vllm_lengths` converts).
        request_rate: requests a second; None: as fast as the concurrency lets.
        seed: of the data.
        percentiles: that the tool reports; the report computes its own.
        most_failed: share of failed requests above which a measurement counts as failed.
    """

    tool: Literal["vllm", "guidellm", "builtin"] = "vllm"
    command: tuple[Text, ...] | None = None
    prompts: Count
    concurrency: Count
    warmups: Annotated[int, Field(strict=True, ge=0, le=1 << 24)]
    isl: Count
    osl: Count
    shortest_share: Annotated[FiniteFloat, Field(strict=True, gt=0, le=1)] = 0.8
    request_rate: Annotated[FiniteFloat, Field(strict=True, gt=0)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    percentiles: tuple[Annotated[FiniteFloat, Field(strict=True, gt=0, lt=100)], ...] = (90.0, 99.0, 99.9)
    ignore_eos: bool = True
    most_failed: Annotated[FiniteFloat, Field(strict=True, ge=0, lt=1)] = 0.05

    @model_validator(mode="after")
    def _guidellm_can(self) -> Client:
        if self.tool == "guidellm" and (self.request_rate is not None or not self.ignore_eos):
            raise ValueError("tool guidellm has no request_rate beside a concurrency, and always ignores EOS")
        return self

    @model_validator(mode="after")
    def _vllm_can(self) -> Client:
        shortest = min(self.isl, self.osl)
        if self.tool == "vllm" and not self.vllm_lengths(shortest)[0]:
            raise ValueError(f"vllm bench serve can't draw lengths up to {shortest}; with shortest_share 1 it can")
        return self

    def vllm_lengths(self, longest: int) -> tuple[int, float]:
        """Length and ``--random-range-ratio`` with which vLLM draws from [share x longest, longest].

        vLLM draws from [L(1 - r), L(1 + r)]: L is the middle of the range, r its half width relative to L.

        Args:
            longest: ``isl`` or ``osl``, tokens.
        """
        share = self.shortest_share
        # the ratio is cut, not rounded: a little more would be a token more than the longest
        return int(longest * (1 + share) / 2), math.floor((1 - share) / (1 + share) * 1e4 + 1e-6) / 1e4


class AccuracyGate(Frozen):
    """What must be true of an arm's answers before its speed counts.

    Attributes:
        prompts: texts whose tokens' log probabilities are compared with the baseline's, teacher forced; none: no gate.
        repeats: how often the baseline is compared with itself.
        factor: a candidate may differ from the baseline by this many times what the baseline differs from itself.
        least: mean absolute difference, nats a token, that is always allowed: a baseline may repeat exactly.
        greedy_tokens: tokens of an answer that are compared and reported, never gated; 0: none.
        evals: lm-eval tasks at points that have ``is_eval``.
        floor: least ``exact_match`` of every eval metric; an eval without a metric has failed.
        eval_command: lm-eval's first words; None: ``lm_eval``.
        eval_limit: questions of a task; None: all.
    """

    prompts: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=1 << 16)], ...],
                       Field(max_length=1000)] = ()  # fmt: skip
    repeats: Count = 2
    factor: Annotated[FiniteFloat, Field(strict=True, ge=1)] = 3.0
    least: Annotated[FiniteFloat, Field(strict=True, ge=0)] = 0.02
    greedy_tokens: Annotated[int, Field(strict=True, ge=0, le=4096)] = 32
    evals: tuple[Name, ...] = ()
    floor: Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)] = 0.9
    eval_shots: Annotated[int, Field(strict=True, ge=0, le=100)] = 5
    eval_command: tuple[Text, ...] | None = None
    eval_limit: Count | None = None


class Deadlines(Frozen):
    """Seconds after which a phase of a job has failed."""

    ready: Seconds = 3600
    gate: Seconds = 1800
    warmup: Seconds = 1800
    load: Seconds = 7200
    evals: Seconds = 7200
    stop: Seconds = 120
    free: Seconds = 300  # for port and GPUs to be free before a server starts
    job: Seconds = 8 * 3600  # all of it; a batch system's time limit is this and a margin


class Polls(Frozen):
    """Seconds between two looks."""

    ready: Seconds = 2.0
    watch: Seconds = 1.0  # the server's process and log
    gpu: Seconds = 1.0  # clocks, power, memory


class PointJob(Frozen):
    """All that a job needs to run one point on a node without asking anyone: ``point.json``.

    Attributes:
        run: name of the run.
        label: words that every output of the run shows, e.g. that a server is not vLLM; empty: none.
        arms: what is compared; the first one is the baseline, and the gate's measure.
        order: arms' names in the order in which servers run, each its own server: ABBA for one pair of pairs.
        node: the one that it must run on; None: any.
        gpus: that a server needs.
        gpu_vendor: what samples them and what a container must be given.
        fatal: regular expressions; a line of a server's log that one finds ends the attempt.
        needs: files and folders on the node without which the point can't run (a local model).
        profile: take a trace of some steps of every server.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    run: Name
    label: Annotated[str, StringConstraints(max_length=400)] = ""
    point: Point
    node: Text | None = None
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=8)]
    order: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    client: Client
    gate: AccuracyGate = AccuracyGate()
    deadlines: Deadlines = Deadlines()
    polls: Polls = Polls()
    host: Text = "127.0.0.1"
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 8888
    gpus: Annotated[int, Field(strict=True, ge=0, le=1024)]
    gpu_vendor: Literal["amd", "nvidia", "none"]
    fatal: tuple[Text, ...] = ()
    needs: tuple[Text, ...] = ()
    profile: bool = False

    @model_validator(mode="after")
    def _arms_fit(self) -> PointJob:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError("two arms have the same name")
        if set(self.order) != set(names):
            raise ValueError(f"order has {sorted(set(self.order))}; the arms are {sorted(names)}")
        return self

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)


class Compare(Frozen):
    """How an A/B of a run is judged (`epfuse.serving.verdict`).

    Attributes:
        least_effect: relative difference below which two arms are the same for all that anyone cares.
        level: family-wise error rate over the run's points.
    """

    baseline: Name = "baseline"
    candidate: Name = "candidate"
    least_effect: Annotated[FiniteFloat, Field(strict=True, ge=0, lt=1)] = 0.01
    level: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=0.5)] = 0.05


class Slurm(Frozen):
    """What sbatch is told beyond the job itself; None or empty: nothing."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    nodelist: Text | None = None
    gres: Text | None = None
    exclusive: StrictBool = True
    cpus: Count | None = None
    arguments: tuple[Text, ...] = ()


class Run(Frozen):
    """A resolved run: ``run.json``. Its points are in ``points/NAME/point.json``.

    Attributes:
        name: of the run; begins every key.
        recipe: name of the recipe, and the SHA-256 of its text.
        created: seconds since 1970.
        points: names, in the order of submission.
        canary: the point that must end well before others start; None: none.
        launcher: what starts jobs.
        hosts: of the ssh launcher.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[Name, StringConstraints(max_length=60)]
    label: Annotated[str, StringConstraints(max_length=400)] = ""
    recipe: Text
    recipe_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    epfuse: Text
    created: FiniteFloat
    points: Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)]
    canary: Name | None = None
    compare: Compare | None = None
    launcher: Literal["local", "slurm", "ssh"] = "local"
    slurm: Slurm = Slurm()
    hosts: tuple[Text, ...] = ()
