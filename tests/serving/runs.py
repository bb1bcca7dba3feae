"""Runs that never ran: folders as jobs leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epfuse.serving.done import Done, End, GateResult, Leg
from epfuse.serving.layout import RunFolder, make_key, write_model
from epfuse.serving.matrix import Selection, expand
from epfuse.serving.plan import jobs, resolve
from epfuse.serving.point import PointJob
from epfuse.serving.recipe import load_recipe
from tests.serving.test_results import raw

LABEL = "Not vLLM: <b>made up</b> for a test"


def make_run(folder: Path, pairs: int = 4, effect: float = 0.05, recipe: str = "minimaxm3-mi300x") -> RunFolder:
    """Six points of a comparison, all done."""
    loaded = load_recipe(recipe)
    found = expand(loaded.recipe.matrix, loaded.recipe.runners, Selection(concurrencies=loaded.recipe.six))
    run = RunFolder(folder)
    made = [job.model_copy(update={"label": LABEL}) for job in jobs(loaded.recipe, found, "first", pairs=pairs)]
    run.create(resolve(loaded, made).model_copy(update={"label": LABEL, "created": 1.8e9}), made)
    for number, job in enumerate(made):
        finish(run, job, effect, seed=100 * number)
    return run


def finish(run: RunFolder, job: PointJob, effect: float = 0.05, seed: int = 0, state: End = End.DONE) -> Done:
    """Write what an attempt leaves."""
    point = run.point(job.point.name)
    key = make_key(job.run, job.point.name, 1)
    attempt = point.attempt(key)
    legs = []
    for number, arm in enumerate(job.order, 1):
        files = attempt.leg(number, arm)
        files.path.mkdir(parents=True)
        concurrency = min(job.client.concurrency, 8)
        content = raw(60, concurrency, seed + (number - 1) // 2)
        if arm == "candidate":
            speed_up(content, 1 + effect + 0.001 * (number % 3))
        files.result.write_text(json.dumps(content))
        files.server_log.write_text("ready\n")
        gate = GateResult(
            passed=True, reason="", difference=0.001 * number, allowed=0.02, greedy_equal=30, greedy_total=32
        )
        legs.append(
            Leg(
                number=number,
                arm=arm,
                folder=str(files.path.relative_to(point.path)),
                state=End.DONE,
                started=1.0,
                ended=2.0,
                metrics={"total_token_throughput": 1.0},
                gate=gate,
            )
        )
    attempt.job_log.write_text("log\n")
    packages = {"vllm": "0.33.0", "torch": "2.14.0"}
    arms = {name: {"packages": packages, "plugin_sha256": name[0] * 4} for name in dict.fromkeys(job.order)}
    attempt.versions.write_text(json.dumps({"node": "n1", "epfuse": "0.1.0", "arms": arms}))
    done = Done(name=job.point.name, key=key, state=state, node="n1", started=1.0, ended=2.0, legs=tuple(legs))
    write_model(point.done, done)
    return done


def speed_up(content: dict[str, Any], factor: float) -> None:
    """The same requests, all faster."""
    content["duration"] /= factor
    content["ttfts"] = [value / factor for value in content["ttfts"]]
    content["itls"] = [[gap / factor for gap in gaps] for gaps in content["itls"]]
    content["start_times"] = [value / factor for value in content["start_times"]]
