"""A server with epfuse or without: its command, its environment, and the caches that it finds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.serve_on_gpu.models import MODELS, write_model
from tools.serve_on_gpu.plugin import FOLDER
from tools.serve_on_gpu.records import read_lines

from epfuse.report.write import write_atomic
from epfuse.serving.environments import Task, prepare
from epfuse.serving.leg import LEAVES, RUNS
from epfuse.serving.plugin import ENTRY_POINTS
from epfuse.serving.point import Venv

ROOT = Path(__file__).resolve().parents[2]
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
PLUGINS = "[vllm.general_plugins]\nserve_on_gpu = tools.serve_on_gpu.plugin:register\n"
PLUGINS += "serve_on_gpu_m3 = tools.serve_on_gpu.m3:register\n"
SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
OF_THE_MACHINE = ("NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM_", "CUDA_", "VLLM_CPU_")
"""Variables that a machine's owner has set for its links and devices: a server must see them."""
WORKER = re.compile(r"\((\w+) pid=\d+\)")
"""What vLLM puts before a line of a process of its own: EngineCore, or with several GPUs Worker_TP0_EP0 and so on."""
OWN_EXPERTS = re.compile(r"Using '?(\w+)'? .*MoE backend")
"""vLLM's choice of experts, which it makes before epfuse takes a layer from it."""
GPU_NAME = re.compile(r"NVIDIA [A-Z]+\d+[^,;:.()]*|AMD Instinct [A-Z0-9]+")


class ServerArm(StrEnum):
    """Who runs the experts."""

    NONE = "none"
    EPFUSE = "epfuse"


@dataclass(frozen=True)
class Workplace:
    """Where servers run.

    Attributes:
        path: a folder with a short name (sockets lie in it): models, caches, logs.
        model: one of `MODELS`, or the folder of a checkpoint.
        arguments: of ``vllm serve``, beyond the model's.
        more_plugins: of vLLM, beside the model's.
        variables: of the servers' environment, ``NAME=VALUE``.
    """

    path: Path
    model: str
    arguments: tuple[str, ...] = ()
    more_plugins: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The model's folder, which is its name in the server too."""
        return self.path / self.model if self.model in MODELS else Path(self.model).absolute()

    @property
    def served(self) -> str:
        """The model and how it is served beyond that: figures of one are not figures of another."""
        return shlex.join([*self.variables, self.model, *self.arguments])

    def prepare(self) -> None:
        """Write what servers need that is not there yet: the model, and metadata of plugins."""
        if self.model in MODELS and not (self.folder / "config.json").exists():
            write_model(self.folder, MODELS[self.model].config())
        for name, points in (("epfuse", ENTRY_POINTS), ("serve_on_gpu", PLUGINS)):
            metadata = self.path / "site" / f"{name}-0.dist-info"
            metadata.mkdir(parents=True, exist_ok=True)
            write_atomic(metadata / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
            write_atomic(metadata / "entry_points.txt", points)

    def home(self, arm: ServerArm) -> Path:
        """The folder that is a server's home, and holds all its caches: each arm has its own."""
        return self.path / f"home-{arm}"

    def empty(self, arm: ServerArm) -> None:
        """Forget what servers of this arm have compiled."""
        shutil.rmtree(self.home(arm), ignore_errors=True)

    def has_cache(self, arm: ServerArm) -> bool:
        """Whether a server of this arm has compiled something here."""
        return any(any(self.home(arm).rglob(f"*.{kind}")) for kind in ("cubin", "hsaco"))

    def task(self, arm: ServerArm, argv: tuple[str, ...], compiles: Path, **settings: str) -> Task:
        """A command of vLLM's in an arm's environment.

        Args:
            arm: whose.
            argv: program and arguments.
            compiles: a folder for the listener.
            settings: more environment variables.
        """
        home = self.home(arm)
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        compiles.mkdir(parents=True, exist_ok=True)
        known = MODELS[self.model].plugins if self.model in MODELS else ()
        plugins = ["serve_on_gpu", *known, *self.more_plugins, *(["epfuse"] if arm is ServerArm.EPFUSE else [])]
        paths = [
            str(self.path / "site"),
            str(ROOT / "src"),
            str(ROOT),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
        ]
        kept = {name: value for name, value in os.environ.items() if name.startswith(OF_THE_MACHINE)}
        caches = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(home / "tmp")}
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "VLLM_PLUGINS": ",".join(plugins),
            FOLDER: str(compiles),
        }
        asked = dict(variable.split("=", 1) for variable in self.variables)
        environment = kept | SETTINGS | asked | own | caches | settings
        return prepare(Venv(), argv, environment, name="", folders=(), gpus=0, vendor="none")

    def serve(self, arm: ServerArm, port: int, compiles: Path, *arguments: str, **settings: str) -> Task:
        """``vllm serve`` of the model."""
        argv = (*VLLM, "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(port))
        return self.task(arm, (*argv, *self.engine_arguments, *arguments), compiles, **settings)

    @property
    def engine_arguments(self) -> tuple[str, ...]:
        """Of ``vllm serve`` and ``vllm bench throughput`` alike."""
        if self.model in MODELS:
            return ("--load-format", "dummy", *MODELS[self.model].arguments, *self.arguments)
        return self.arguments


def last_option(arguments: Sequence[str], *names: str) -> str | None:
    """The value that a command line gives an option, under any of its names; the last one counts, as in vLLM.

    vLLM reads an underscore in an option as a hyphen.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next((word for option, word in reversed(list(pairwise(words))) if option.replace("_", "-") in names), None)


def compiled_since(compiles: Path, moment: float) -> dict[str, dict[str, int]]:
    """What a server's processes have compiled and loaded before a moment and since: who and when -> how many.

    Args:
        compiles: the listener's folder.
        moment: seconds since 1970.
    """
    found: dict[str, dict[str, int]] = {}
    for line in read_lines(compiles):
        whose = "ours" if line["ours"] else "others"
        when = "before" if line["time"] < moment else "after"
        row = found.setdefault(f"{whose} {when}", {"compiled": 0, "loaded": 0})
        row["loaded" if line["hit"] else "compiled"] += 1
    return found


def what_the_log_says(log: Path, arm: ServerArm) -> dict[str, Any]:
    """The plugin's sentences, each once, who said that epfuse runs experts, and the GPUs that they name; vLLM's choice.

    ``fits`` is whether the arm is what it should be. Without epfuse there must be no
    sentence; with epfuse some layer must run in it, or be left to vLLM with a reason.
    """
    text = log.read_text(errors="replace")
    said = dict.fromkeys(
        line[line.index(word) :] for line in text.splitlines() for word in (RUNS, LEAVES) if word in line
    )
    warm = dict.fromkeys(re.findall(r"epfuse: (.+)", text))
    return {
        "fits": bool(said) is (arm is ServerArm.EPFUSE),
        "runs": any(line.startswith(RUNS) for line in said),
        "workers": sorted({match[1] for line in text.splitlines() if RUNS in line and (match := WORKER.match(line))}),
        "said": list(said)[:8],
        "own_experts": sorted(set(OWN_EXPERTS.findall(text))),
        "warm_up": list(warm)[:20],
        "gpus": sorted({name.strip() for line in said for name in GPU_NAME.findall(line)}),
    }
