"""lm-eval against a running server, and what its results say."""

from __future__ import annotations

import math
from pathlib import Path

from epfuse.errors import EpfuseError
from epfuse.input_file import read_json
from epfuse.serving.point import AccuracyGate

METRIC = "exact_match"
MOST_IN_FLIGHT = 64


def eval_command(
    gate: AccuracyGate, model: str, host: str, port: int, concurrency: int, folder: Path
) -> tuple[str, ...]:
    """lm-eval's command: chat completions, temperature 0, the tasks of the gate.

    Args:
        gate: tasks, shots, questions.
        model: the server's name of it.
        host: of the server.
        port: of the server.
        concurrency: requests in flight, up to `MOST_IN_FLIGHT`.
        folder: where the results are to lie.
    """
    url = f"http://{host}:{port}/v1/chat/completions"
    in_flight = min(concurrency, MOST_IN_FLIGHT)
    server = f"model={model},base_url={url},num_concurrent={in_flight},max_retries=3,tokenized_requests=False"
    argv = [*(gate.eval_command or ("lm_eval",)), "--model", "local-chat-completions", "--apply_chat_template"]
    argv += ["--model_args", server, "--tasks", ",".join(gate.evals), "--num_fewshot", str(gate.eval_shots)]
    argv += ["--gen_kwargs", "temperature=0,max_gen_toks=2048", "--output_path", str(folder)]
    argv += [] if gate.eval_limit is None else ["--limit", str(gate.eval_limit)]
    return tuple(argv)


def read_evals(gate: AccuracyGate, folder: Path) -> tuple[dict[str, float], str]:
    """The metrics that lm-eval left, and why they do not pass; empty if they do.

    Args:
        gate: tasks and the floor.
        folder: that `eval_command` was given.

    Returns:
        ``task/metric,filter`` -> value; and the reason. A task without a metric does not pass, nor does a value below
        the floor, nor one that is no number.
    """
    found: dict[str, float] = {}
    for file in sorted(folder.rglob("results*.json")):
        try:
            results = read_json(file, "lm-eval result", 1 << 28)["results"]
            for task in gate.evals:
                for name, value in results.get(task, {}).items():
                    number = isinstance(value, int | float) and not isinstance(value, bool)
                    if name.split(",")[0] == METRIC and number and math.isfinite(value):
                        found[f"{task}/{name}"] = float(value)
        except (EpfuseError, LookupError, TypeError, AttributeError, OverflowError) as error:
            return {}, f"lm-eval's {file.name} can't be read: {error!r:.200}"
    silent = [task for task in gate.evals if not any(name.startswith(f"{task}/") for name in found)]
    if silent:
        return found, f"lm-eval gave no {METRIC} of {', '.join(silent)}"
    low = {name: value for name, value in found.items() if value < gate.floor}
    return found, ", ".join(f"{name} is {value:.4f}, below {gate.floor:g}" for name, value in low.items())
