"""The demonstration of `epfuse serve` on any machine: six scaled-down points, and a comparison at one of them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Literal

from epfuse.errors import ConfigError
from epfuse.serving.layout import RunFolder
from epfuse.serving.matrix import expand
from epfuse.serving.plan import jobs, resolve
from epfuse.serving.point import Command, PointJob, Venv
from epfuse.serving.recipe import LoadedRecipe, load_recipe
from epfuse.serving.server import free_port

ROOT = Path(__file__).resolve().parents[3]
"""A checkout, if epfuse was not installed as a wheel."""
PAIRS = {"transformers": 4, "vllm": 2}
"""Of the comparison. A server of vLLM takes 40 s to start on two cores."""
BOTH_ARMS = {"transformers": True, "vllm": False}
"""Whether points without a comparison serve both arms once, so that the gate has something to compare."""
WRITING_SECONDS = 300.0

Server = Literal["transformers", "vllm"]


def vllm_environment() -> Path | None:
    """The environment in which `make test-vllm-e2e` has installed vLLM for CPUs; None if it has not."""
    made = ROOT / ".vllm" / "cpu"
    writer = ROOT / "tests" / "integrations" / "vllm_e2e" / "checkpoint.py"
    return made if (made / "bin" / "vllm").exists() and writer.exists() else None


def prepare(folder: Path, server: Server, name: str, environment: Path | None = None) -> RunFolder:
    """Make the run, ready to be dispatched.

    Args:
        folder: of the run; has none yet.
        name: of the run.
        server: what serves.
        environment: with ``vllm``: the virtual environment of vLLM for CPUs; None: `vllm_environment`.

    Raises:
        ConfigError: the folder has a run, or vLLM for CPUs is not there.
        OSError: the folder can't be written.
    """
    run = RunFolder(folder)
    if run.run.exists():
        raise ConfigError(f"{folder} has a run already; give another folder, or resume that one")
    file = {"transformers": "transformers.yaml", "vllm": "vllm-cpu.yaml"}[server]
    loaded = load_recipe(str(resources.files("epfuse.serving") / "demos" / file))
    loaded = replace(loaded, source=f"epfuse's {file}")
    found = _six_points(loaded, server, name)
    folder.mkdir(parents=True, exist_ok=True)
    if server == "vllm":
        at = environment or vllm_environment()
        if at is None:
            raise ConfigError("vLLM for CPUs is not installed here; make test-vllm-e2e installs it, in a checkout")
        model = (folder / "model").absolute()
        _write_model(at, model)
        found = [_served_from(job, at, model) for job in found]
    port = free_port()
    found = [_with_this_epfuse(job, port) for job in found]
    compared = next(job for job in found if len(job.order) > 2)
    header = resolve(loaded, found).model_copy(update={"compare": resolve(loaded, [compared]).compare})
    run.create(header, found)
    return run


def _six_points(loaded: LoadedRecipe, server: Server, run: str) -> list[PointJob]:
    """Each point once, the one with the longer input and the most requests in flight as a comparison."""
    rows = expand(loaded.recipe.matrix, loaded.recipe.runners)
    arms = tuple(arm.name for arm in loaded.recipe.arms) if BOTH_ARMS[server] else (loaded.recipe.arms[0].name,)
    compared = max(rows, key=lambda row: (row.isl, row.conc))
    once = jobs(loaded.recipe, [row for row in rows if row is not compared], run, arms=arms)
    return once + jobs(loaded.recipe, [compared], run, pairs=PAIRS[server])


def _with_this_epfuse(job: PointJob, port: int) -> PointJob:
    """Servers import the epfuse that prepared the run, also where it is not installed; the port is free here."""
    where = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    arms = tuple(
        arm.model_copy(update={"server": Command(argv=arm.server.argv, env=where | arm.server.env)}) for arm in job.arms
    )
    return job.model_copy(update={"arms": arms, "port": port})


def _served_from(job: PointJob, environment: Path, model: Path) -> PointJob:
    """The job with vLLM's environment and the model's folder, which the small model has no name for."""
    name = job.point.model
    arms = tuple(
        arm.model_copy(
            update={
                "environment": Venv(path=str(environment.absolute())),
                "server": Command(
                    argv=tuple(str(model) if word == name else word for word in arm.server.argv), env=arm.server.env
                ),
            }
        )
        for arm in job.arms
    )
    point = job.point.model_copy(update={"model": str(model)})
    return job.model_copy(update={"arms": arms, "point": point, "needs": (str(model),)})


def _write_model(environment: Path, model: Path) -> None:
    """The checkpoint of the end-to-end tests: it recites two sentences, through its experts."""
    model.mkdir()
    code = "import pathlib, sys; from tests.integrations.vllm_e2e.checkpoint import write_checkpoint;"
    code += "write_checkpoint(pathlib.Path(sys.argv[1]))"
    argv = [str(environment / "bin" / "python"), "-c", code, str(model)]
    try:
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=WRITING_SECONDS)
    except subprocess.SubprocessError as error:
        raise ConfigError(f"the small MiniMax-M3 could not be written to {model}: {error}") from None
