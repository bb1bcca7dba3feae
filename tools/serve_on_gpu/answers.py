"""Parts ``logprobs`` and ``recite``: what a server says of texts, beside transformers' own model in float32."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tools.serve_on_gpu.arms import ServerArm, Workplace, what_the_log_says
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import READY, STOP, complete

from epfuse.serving import gate
from epfuse.serving.point import AccuracyGate
from epfuse.serving.prompts import PROMPTS
from epfuse.serving.server import Server, ServerFault, free_port

T = TypeVar("T")
TEXTS = (*PROMPTS, "\n".join(PROMPTS), " ".join(reversed(PROMPTS)))
"""Two of them are long: kernels for many tokens run too."""
NUMBERS = {"mxfp8": 1, "bf16": 2}
"""Of the formats' records."""
WAYS = (1, 8)
"""Texts that a server gets at once."""
SECONDS, PAIR_SECONDS = 85.0, 150.0
"""A server with its questions is taken to need so long, and two that start at the same time."""
ERRORS = 2.0
"""Standard errors that the mean difference may lie above 0: the same errors in another order."""


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        server: for `Server.during`.
        port: of the server.
        model: its name.
        mark: of its processes.
        log: of the server.
        compiles: the listener's folder.
        budget: of the part.
    """

    server: Server
    port: int
    model: str
    mark: str
    log: Path
    compiles: Path
    budget: TimeBudget

    def during(self, work: Callable[[], T]) -> T:
        """Work that talks to the server, which is watched."""
        return self.server.during(work, self.budget)


@contextmanager
def serving(
    place: Workplace, arm: ServerArm, name: str, budget: TimeBudget, *arguments: str, **settings: str
) -> Iterator[Running]:
    """A server for as long as the block runs.

    Args:
        place: where it runs.
        arm: with epfuse or without.
        name: of its folder of logs.
        budget: of the part.
        arguments: more of ``vllm serve``.
        settings: more environment variables.

    Raises:
        ServerFault: it does not start, or is not what the arm says.
    """
    with _started(place, arm, name, budget, *arguments, **settings) as running:
        _wait_until_ready(running, arm, budget)
        yield running


@contextmanager
def serving_both(
    place: Workplace, name: str, budget: TimeBudget, more: Callable[[ServerArm], Sequence[str]] = lambda _: ()
) -> Iterator[dict[ServerArm, Running]]:
    """A server of each arm, started at the same time: both take the time of one.

    Args:
        place: where they run; its arguments say how much memory each takes.
        name: of their folders of logs.
        budget: of the part.
        more: arguments of ``vllm serve`` that an arm has for itself.

    Raises:
        ServerFault: one does not start, or is not what its arm says; the other is not waited for then.
    """
    with ExitStack() as stack:
        both = {
            arm: stack.enter_context(_started(place, arm, f"{name}-{arm}", budget, *more(arm))) for arm in ServerArm
        }

        def watch() -> None:
            budget()
            for running in both.values():
                running.server.check()

        for arm, running in both.items():
            _wait_until_ready(running, arm, watch)
        yield both


@contextmanager
def _started(
    place: Workplace, arm: ServerArm, name: str, budget: TimeBudget, *arguments: str, **settings: str
) -> Iterator[Running]:
    """As `serving`, but nobody has waited until it answers."""
    mark = secrets.token_hex(16)
    logs = place.path / "logs" / f"{name}-{mark[:6]}"
    logs.mkdir(parents=True)
    port = free_port()
    task = place.serve(arm, port, logs / "compiles", *arguments, **settings)
    server = Server(task, logs / "server.log", port, mark, look=0.2)
    try:
        yield Running(server, port, str(place.folder), mark, logs / "server.log", logs / "compiles", budget)
    finally:
        server.stop(STOP)


def _wait_until_ready(running: Running, arm: ServerArm, watch: Callable[[], None]) -> None:
    running.server.wait_ready(min(READY, running.budget.left), running.model, watch)
    said = what_the_log_says(running.log, arm)
    if not said["fits"] or (arm is ServerArm.EPFUSE and not said["runs"]):
        raise ServerFault(f"the server's log does not fit an arm {arm}: {said['said']}")


def logprobs(
    places: dict[str, Workplace],
    reference: Callable[[], gate.Reading],
    folder: Folder,
    budget: TimeBudget,
    facts: dict[str, Any],
) -> Outcome:
    """Each format's pair of servers reads the texts; errors against the reference are compared.

    Args:
        places: format -> its checkpoint's.
        reference: reads the texts in float32, once.
        folder: gets a record of each format.
        budget: of the part.
        facts: of the machine.
    """
    outcome, known = Outcome(), None
    for form, place in places.items():
        number = NUMBERS[form]
        if folder.has("logprobs", number, ServerArm.EPFUSE):
            continue
        record: dict[str, Any] = {"complete": False, "model": f"seeded minimax-m3, {form}", "facts": facts}
        keep = partial(folder.keep, "logprobs", number, ServerArm.EPFUSE, record)
        with (
            outcome.attempt(f"log probabilities of {form}", record, keep, " and those after it"),
            budget.work("a pair of servers", PAIR_SECONDS),
        ):
            known = known or reference()
            with serving_both(place, f"logprobs-{form}", budget) as running:
                errors = {arm: _errors(server, known) for arm, server in running.items()}
            record |= compare(errors[ServerArm.EPFUSE], errors[ServerArm.NONE]) | {"complete": True}
            say(f"{form}: {record['reason']}")
        if outcome.left:
            break
    return outcome


def _errors(running: Running, known: gate.Reading) -> list[float]:
    """Of each token in each way, absolute, nats."""
    wanted = AccuracyGate(prompts=TEXTS, greedy_tokens=0)
    readings = [
        running.during(lambda way=way: gate.read(running.port, running.model, wanted, way, 120.0)) for way in WAYS
    ]
    found = []
    for reading in readings:
        gate.distance(reading, known)  # the same tokens, or it raises
        for mine, right in zip(reading.logprobs, known.logprobs, strict=True):
            found += [abs(a - b) for a, b in zip(mine, right, strict=True)]
    return found


def compare(ours: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Whether our errors exceed vLLM's own in the mean, by more than the tokens' own scatter.

    Args:
        ours: absolute errors, nats, token by token.
        own: of the same tokens.
    """
    differences = [a - b for a, b in zip(ours, own, strict=True)]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    reason = (
        f"mean error against float32 {statistics.fmean(ours):.5f} nats with epfuse,"
        f" {statistics.fmean(own):.5f} without; difference {mean:+.5f}, standard error {error:.5f}, {len(ours)} tokens"
    )
    return {
        "passed": mean <= ERRORS * error,
        "reason": reason,
        "mean_error": {"epfuse": statistics.fmean(ours), "none": statistics.fmean(own)},
        "largest_error": {"epfuse": max(ours), "none": max(own)},
        "difference": mean,
        "standard_error": error,
    }


def recite(
    place: Workplace, sentences: dict[str, str], folder: Folder, budget: TimeBudget, facts: dict[str, Any]
) -> Outcome:
    """A server with epfuse finishes sentences that the checkpoint knows by heart.

    Args:
        place: the checkpoint's.
        sentences: prompt -> the rest of the sentence, a token a byte.
        folder: gets a record.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    if folder.has("recite", 1, ServerArm.EPFUSE):
        return outcome
    record: dict[str, Any] = {"complete": False, "model": "reciting minimax-m3", "facts": facts}
    with (
        outcome.attempt("the recital", record, partial(folder.keep, "recite", 1, ServerArm.EPFUSE, record)),
        budget.work("a server", SECONDS),
        serving(place, ServerArm.EPFUSE, "recite", budget) as running,
    ):

        def said() -> dict[str, str]:
            answers = {
                prompt: complete(running.port, running.model, prompt, len(rest)) for prompt, rest in sentences.items()
            }
            return {prompt: "".join(token for token, _ in answer) for prompt, answer in answers.items()}

        found = running.during(said)
        passed = found == sentences
        words = "every sentence is recited" if passed else f"it says {found}, and should say {sentences}"
        record |= {"complete": True, "passed": passed, "reason": words}
    return outcome
