"""Where a command runs: a virtual environment, or an image through docker, podman, apptainer or pyxis.

What each engine needs to be told is in one table, `_ENGINES`. Values of variables never stand in a command line, where
other users of the node could read them: the engine is given names, and its own environment has the values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epfuse.serving.point import Image, Mount, Venv

KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "TERM", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME",
        "LD_LIBRARY_PATH", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # fmt: skip
"""What a command sees of the environment that the job was started in, besides Slurm's: the rest could change results
without standing in any file of the run."""


@dataclass(frozen=True)
class Task:
    """A command, ready to be started on this node.

    Attributes:
        argv: program and arguments.
        environment: all of it.
        ending: a command that ends it where it is no child of ours; empty: there is none.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    ending: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Wish:
    """What a container is to have."""

    image: Image
    name: str
    argv: tuple[str, ...]
    names: tuple[str, ...]
    mounts: tuple[Mount, ...]
    gpus: int
    vendor: str


def prepare(
    where: Venv | Image,
    argv: tuple[str, ...],
    settings: dict[str, str],
    *,
    name: str,
    folders: tuple[Path, ...],
    gpus: int,
    vendor: str,
) -> Task:
    """The task that runs ``argv`` in an environment.

    Args:
        where: the environment.
        argv: program and arguments, as they are written inside.
        settings: environment variables.
        name: unique on the node; a container gets it.
        folders: of this node, seen under the same path inside, writable.
        gpus: that it may use; 0: none are handed in.
        vendor: ``amd``, ``nvidia`` or ``none``.
    """
    kept = {key: value for key, value in os.environ.items() if key in KEPT or key.startswith("SLURM")}
    if isinstance(where, Venv):
        program = Path(sys.executable).parent if where.path is None else Path(where.path).absolute() / "bin"
        kept["PATH"] = os.pathsep.join([str(program), kept.get("PATH", os.defpath)])
        if where.path is not None:
            kept["VIRTUAL_ENV"] = str(Path(where.path).absolute())
        found = program / argv[0]
        first = str(found) if "/" not in argv[0] and found.exists() else argv[0]
        return Task((first, *argv[1:]), kept | settings)
    ours = tuple(Mount(source=str(folder), target=str(folder), read_only=False) for folder in folders)
    wish = _Wish(where, name, argv, tuple(settings), where.mounts + ours, gpus, vendor)
    made, variables, ending = _ENGINES[where.engine](wish)
    return Task(made, kept | settings | {key: settings[variable] for key, variable in variables.items()}, ending)


Made = tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]
"""Command line; variables for the engine's own environment, by the name of what they carry; command that ends it."""


def _docker(wish: _Wish) -> Made:
    return _oci("docker", wish, ("--gpus", "all"))


def _podman(wish: _Wish) -> Made:
    return _oci("podman", wish, ("--device", "nvidia.com/gpu=all"))


def _oci(engine: str, wish: _Wish, nvidia: tuple[str, ...]) -> Made:
    argv = [engine, "run", "--rm", "--init", "--name", wish.name, "--network", "host", "--entrypoint", wish.argv[0]]
    argv += ["--shm-size", f"{wish.image.shm_gib}g", "--ulimit", "memlock=-1"]
    if wish.gpus and wish.vendor == "amd":
        argv += ["--device", "/dev/kfd", "--device", "/dev/dri", "--group-add", "video"]
        argv += ["--security-opt", "seccomp=unconfined", "--cap-add", "SYS_PTRACE"]  # ROCm's IPC between ranks
    if wish.gpus and wish.vendor == "nvidia":
        argv += nvidia
    for mount in wish.mounts:
        mode = "readonly" if mount.read_only else ""
        argv += ["--mount", ",".join(filter(None, ("type=bind", f"src={mount.source}", f"dst={mount.target}", mode)))]
    for name in wish.names:
        argv += ["--env", name]
    return (*argv, wish.image.reference, *wish.argv[1:]), {}, (engine, "rm", "--force", wish.name)


def _apptainer(wish: _Wish) -> Made:
    argv = ["apptainer", "exec", "--no-home", "--cleanenv", "--writable-tmpfs"]
    if wish.gpus and wish.vendor == "amd":
        argv += ["--rocm", "--bind", "/dev/kfd,/dev/dri"]
    if wish.gpus and wish.vendor == "nvidia":
        argv += ["--nv"]
    argv += ["--bind", "/dev/shm"]  # the node's own: apptainer has no size for it
    for mount in wish.mounts:
        argv += ["--bind", f"{mount.source}:{mount.target}:{'ro' if mount.read_only else 'rw'}"]
    return (*argv, wish.image.reference, *wish.argv), {f"APPTAINERENV_{name}": name for name in wish.names}, ()


def _pyxis(wish: _Wish) -> Made:
    mounts = [f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}" for mount in wish.mounts]
    if wish.gpus and wish.vendor == "amd":
        mounts += ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"]
    argv = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--kill-on-bad-exit=1", f"--job-name={wish.name}"]
    argv += [f"--container-image={wish.image.reference}", "--no-container-mount-home", "--container-writable"]
    argv += [f"--container-mounts={','.join([*mounts, '/dev/shm:/dev/shm'])}"]
    if wish.names:
        argv += [f"--container-env={','.join(wish.names)}"]
    if wish.gpus and wish.vendor == "nvidia":
        argv += [f"--gpus={wish.gpus}"]
    # srun hands SIGTERM on to its task
    return (*argv, *wish.argv), {}, ()


_ENGINES: dict[str, Callable[[_Wish], Made]] = {
    "docker": _docker,
    "podman": _podman,
    "apptainer": _apptainer,
    "pyxis": _pyxis,
}
