"""What each engine is given, read by stubs with the engines' own kinds of command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.environments import prepare
from epfuse.serving.plugin import place
from epfuse.serving.point import Image, Mount, PutIn, Venv

SECRET = "it's a secret; $HOME"

STUB = """#!{python}
import json, os, pathlib, sys
pathlib.Path({out!r}).write_text(json.dumps([sys.argv, dict(os.environ)]))
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Prepare a task, start it, and return what the engine saw: command line and environment."""

    def start(engine: str, vendor: str, gpus: int = 8):
        stubs, out = tmp_path / "bin", tmp_path / "out.json"
        stubs.mkdir()
        program = stubs / {"pyxis": "srun"}.get(engine, engine)
        program.write_text(STUB.format(python=sys.executable, out=str(out)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
        monkeypatch.setenv("NOT_FOR_RESULTS", "1")
        image = Image(
            engine=engine,
            reference="vllm/vllm:tag",
            mounts=(Mount(source=str(tmp_path / "models"), target=str(tmp_path / "m")),),
            shm_gib=32,
        )
        task = prepare(
            image,
            ("vllm", "serve", "M3"),
            {"PLAIN": "1", "TOKEN": SECRET},
            name="epfuse-1",
            folders=(tmp_path / "results",),
            gpus=gpus,
            vendor=vendor,
        )
        subprocess.run(task.argv, env=task.environment, check=True)
        argv, environment = json.loads(out.read_text())
        assert "NOT_FOR_RESULTS" not in environment
        assert not any(SECRET in part for part in argv)  # other users of the node read command lines
        return argv[1:], environment, task

    return start


def oci_options(argv):
    parser = argparse.ArgumentParser()
    for flag in ("--rm", "--init"):
        parser.add_argument(flag, action="store_true")
    for option in ("name", "network", "shm-size", "ulimit", "entrypoint", "gpus", "security-opt", "cap-add"):
        parser.add_argument(f"--{option}")
    for option in ("device", "group-add", "mount", "env"):
        parser.add_argument(f"--{option}", action="append", default=[])
    image = argv.index("vllm/vllm:tag")
    assert argv[0] == "run"
    return parser.parse_args(argv[1:image]), argv[image + 1 :]


@pytest.mark.parametrize("engine", ["docker", "podman"])
@pytest.mark.parametrize("vendor", ["amd", "nvidia", "none"])
def test_docker_and_podman(started, engine, vendor, tmp_path):
    argv, environment, task = started(engine, vendor)
    found, rest = oci_options(argv)
    assert (found.rm, found.name, found.network, found.shm_size) == (True, "epfuse-1", "host", "32g")
    assert [found.entrypoint, *rest] == ["vllm", "serve", "M3"]
    gpus = {"docker": ([], "all"), "podman": (["nvidia.com/gpu=all"], None)}[engine]
    assert found.device == {"amd": ["/dev/kfd", "/dev/dri"], "nvidia": gpus[0], "none": []}[vendor]
    assert found.gpus == (gpus[1] if vendor == "nvidia" else None)
    assert found.group_add == (["video"] if vendor == "amd" else [])
    assert found.mount == [
        f"type=bind,src={tmp_path / 'models'},dst={tmp_path / 'm'},readonly",
        f"type=bind,src={tmp_path / 'results'},dst={tmp_path / 'results'}",
    ]
    assert sorted(found.env) == ["PLAIN", "TOKEN"]
    assert (environment["PLAIN"], environment["TOKEN"]) == ("1", SECRET)
    assert task.ending == (engine, "rm", "--force", "epfuse-1")


@pytest.mark.parametrize("vendor", ["amd", "nvidia", "none"])
def test_apptainer(started, vendor, tmp_path):
    argv, environment, task = started("apptainer", vendor)
    assert argv[0] == "exec"
    assert ("--rocm" in argv, "--nv" in argv) == (vendor == "amd", vendor == "nvidia")
    binds = [argv[place + 1] for place, word in enumerate(argv) if word == "--bind"]
    assert ("/dev/kfd,/dev/dri" in binds) == (vendor == "amd")
    assert {
        "/dev/shm",
        f"{tmp_path / 'models'}:{tmp_path / 'm'}:ro",
        f"{tmp_path / 'results'}:{tmp_path / 'results'}:rw",
    } <= set(binds)
    assert argv[-4:] == ["vllm/vllm:tag", "vllm", "serve", "M3"]
    assert environment["APPTAINERENV_TOKEN"] == SECRET
    assert not task.ending


@pytest.mark.parametrize("vendor", ["amd", "nvidia", "none"])
def test_pyxis(started, vendor, tmp_path):
    argv, environment, _ = started("pyxis", vendor)
    options = dict(word.partition("=")[::2] for word in argv if word.startswith("--"))
    assert options["--container-image"] == "vllm/vllm:tag"
    mounts = options["--container-mounts"].split(",")
    assert {
        f"{tmp_path / 'models'}:{tmp_path / 'm'}:ro",
        f"{tmp_path / 'results'}:{tmp_path / 'results'}",
        "/dev/shm:/dev/shm",
    } <= set(mounts)
    assert ("/dev/kfd:/dev/kfd" in mounts) == (vendor == "amd")
    assert options.get("--gpus") == ("8" if vendor == "nvidia" else None)
    assert options["--container-env"].split(",") == ["PLAIN", "TOKEN"]
    assert environment["TOKEN"] == SECRET
    assert argv[-3:] == ["vllm", "serve", "M3"]


def test_no_gpus_hand_in_none(started):
    argv, _, _ = started("docker", "amd", gpus=0)
    assert oci_options(argv)[0].device == []


def test_a_virtual_environment_comes_first(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vllm"
    program.touch()
    task = prepare(Venv(path=str(tmp_path)), ("vllm", "x"), {"A": "1"}, name="", folders=(), gpus=0, vendor="none")
    assert task.argv == (str(program), "x")
    assert task.environment["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")
    assert task.environment["A"] == "1"


def test_a_mounted_epfuse_is_a_plugin_that_any_interpreter_finds(tmp_path):
    hashes = [place(Path(__file__).parents[2], tmp_path / how, how) for how in (PutIn.PLUGIN, PutIn.PATCH)]
    assert len(hashes[0]) == 64
    assert hashes[0] != hashes[1]
    code = (
        "import importlib.metadata as m, epfuse;"
        "print(epfuse.__file__, [e.value for e in m.entry_points(group='vllm.general_plugins')])"
    )
    for how, found in ((PutIn.PLUGIN, "epfuse.integrations.vllm.plugin:register"), (PutIn.PATCH, None)):
        argv = [sys.executable, "-S", "-c", code]
        done = subprocess.run(argv, env={"PYTHONPATH": str(tmp_path / how)}, capture_output=True, text=True, check=True)
        assert str(tmp_path / how) in done.stdout
        assert (found in done.stdout) if found else "[]" in done.stdout


@pytest.mark.parametrize("what", ["empty", "no.whl", "missing"])
def test_a_source_that_is_no_epfuse(tmp_path, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="epfuse_source"):
        place(tmp_path / what, tmp_path / "out", PutIn.PLUGIN)
