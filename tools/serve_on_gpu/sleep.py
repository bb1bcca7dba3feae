"""Part ``sleep``: sleep mode and weights loaded in place; afterwards right answers or an error, never other answers."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.serve_on_gpu.answers import SECONDS, Running, serving
from tools.serve_on_gpu.arms import ServerArm, Workplace
from tools.serve_on_gpu.endure import used_on_gpus
from tools.serve_on_gpu.parts import Folder, Outcome, TimeBudget, say
from tools.serve_on_gpu.servers import complete, post

from epfuse.serving.prompts import PROMPTS
from epfuse.serving.server import ServerFault

RELOAD = ("/collective_rpc", {"method": "reload_weights"})
STEPS: dict[str, tuple[bool, tuple[tuple[str, Any], ...]]] = {
    "sleep level 1": (True, (("/sleep?level=1", None), ("/wake_up", None))),
    "weights loaded in place": (False, (RELOAD,)),
    "sleep level 2": (False, (("/sleep?level=2", None), ("/wake_up?tags=weights", None), RELOAD,
                              ("/wake_up?tags=kv_cache", None))),
}  # fmt: skip
"""What is done -> whether it must work, else an error will do; and the requests."""


def run(place: Workplace, folder: Folder, budget: TimeBudget, facts: dict[str, Any]) -> Outcome:
    """A server of a checkpoint for each of `STEPS`, with epfuse.

    Args:
        place: where it runs; its weights come from a disk.
        folder: gets a record of each.
        budget: of the part.
        facts: of the machine.
    """
    outcome = Outcome()
    for number, (what, (must, requests)) in enumerate(STEPS.items(), 1):
        if folder.has("sleep", number, ServerArm.EPFUSE):
            continue
        record: dict[str, Any] = {"complete": False, "model": f"seeded minimax-m3, {what}", "facts": facts}
        settings = {"VLLM_SERVER_DEV_MODE": "1"}
        with (
            outcome.attempt(
                what,
                record,
                partial(folder.keep, "sleep", number, ServerArm.EPFUSE, record),
                " and what comes after it",
            ),
            budget.work("a server", SECONDS),
            serving(place, ServerArm.EPFUSE, f"sleep-{number}", budget, "--enable-sleep-mode", **settings) as running,
        ):
            record |= _one(running, must, requests) | {"complete": True}
            say(f"{what}: {record['reason']}")
        if outcome.left:
            break
    return outcome


def _one(running: Running, must: bool, requests: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    def answers() -> list[Any]:
        return [complete(running.port, running.model, prompt, 16) for prompt in PROMPTS]

    before = running.during(answers)
    memory = [used_on_gpus()]
    try:
        for path, body in requests:
            running.during(lambda path=path, body=body: post(running.port, path, body))
            memory.append(used_on_gpus())
        after = running.during(answers)
    except ServerFault as fault:
        words = str(fault).splitlines()
        lines = [
            line for line in running.log.read_text(errors="replace").splitlines() if "epfuse" in line and "rror" in line
        ]
        said = "; ".join([words[0], *lines[-1:]])[:600]
        return {"passed": not must, "reason": f"an error{'' if must else ', as documented'}: {said}", "gpu_mib": memory}
    same = after == before
    return {
        "passed": same,
        "reason": "the same answers as before" if same else "OTHER ANSWERS than before, and no error",
        "gpu_mib": memory,
    }
