"""A bundle, made without a GPU, serves a process without compiler and home; a stale one is said and not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from epfuse.bundle import KERNELS, MANIFEST, Bundle
from epfuse.errors import ConfigError, MissingDependency
from epfuse.target import Target
from tests.compiled.image import LIBCUDA
from tests.compiled.test_kernel_cache import MOVERS, ROOT, run

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small model's bundle for 1 and 2 tokens, and what the command said."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    line = ["warmup", "--model", str(folder), "--target", "sm_90", "--no-ep", "--tp", "1", "--max-tokens", "2"]
    kept = {name: value for name, value in os.environ.items() if name not in MOVERS}
    (folder / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "epfuse", *line, "--out", str(folder / "bundle"), "--json"],
        env={**kept, "HOME": str(folder), "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bundle", json.loads(done.stdout)


def test_the_command_says_what_it_made(made: tuple[Path, dict[str, Any]]) -> None:
    bundle, said = made
    assert said["kernels"] == 4  # route, gate_up, down, combine
    assert said["product"] == "NVIDIA H100 80GB HBM3"
    assert len(said["layers"]) == 1  # identical layers once
    assert len(list((bundle / KERNELS).glob("*/*.cubin"))) == 4
    assert list((bundle / KERNELS).glob("*/cuda_utils*.so"))  # what takes a C compiler
    assert not (bundle.parent / ".triton").exists()
    assert not [*(bundle.parent / "tmp").iterdir()]
    seconds = [one["cpu_seconds"] for one in said["compiled"]]
    assert seconds == sorted(seconds, reverse=True)
    assert min(seconds) > 0
    assert {one["kernel"] for one in said["compiled"]} > {"route_kernel", "combine_kernel"}
    assert all(one["constants"] for one in said["compiled"])


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("false", "'false' makes no library: exit code 1"),
        ("true", "'true' makes no library: exit code 0"),
        ("gcc -O1", "CC is 'gcc -O1': No such file or directory"),
        ("", "CC is ''"),
    ],
)
def test_a_compiler_that_does_not_work_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, words: str
) -> None:
    from epfuse.compiled.launchers import _stand_in, compile_driver_module

    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _stand_in.cache_clear()
    with pytest.raises(MissingDependency, match=f"launchers are compiled in C, and {words}"):
        compile_driver_module(Target.SM90)


def test_an_image_without_a_compiler(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Moved, without gcc and ptxas in PATH, without a home, and forbidden to compile; called as a server calls."""
    moved = shutil.copytree(made[0], tmp_path / "opt" / "kernels")
    (tmp_path / "file").touch()
    home = {"PATH": "", "TRITON_HOME": str(tmp_path / "file")}
    found, said = run(tmp_path, "bundled", EPFUSE_KERNELS=str(moved), EPFUSE_NO_COMPILE="1", **home)
    assert found, said
    assert all(hit for _, hit in found["compiled"])
    assert not any("compiling" in line for line in found["said"])
    assert len(found["compiled"]) == found["before"]
    assert found["late"] == 0


KERNEL_NAMES = ["combine_kernel", "down_sm90_kernel", "gate_up_sm90_kernel", "route_kernel"]


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `image.py` where the home can't be written and no program is found, with these variables besides."""
    library = tmp_path / "libcuda.so.1"
    compiler = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(compiler, check=True, input=LIBCUDA.encode())
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "no-home").touch()
    variables = {
        "PATH": str(tmp_path / "bin"),
        "TRITON_HOME": str(tmp_path / "no-home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "EPFUSE_NO_COMPILE": "1",
    }

    def run_image(**more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(Path(__file__).parent / "image.py"), str(library)]
        return subprocess.run(line, env=variables | more, capture_output=True, text=True, check=False, timeout=300)

    return run_image


@pytest.mark.parametrize("has_file", [True, False])
def test_tritons_own_driver_and_launchers_load_without_a_compiler(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, image: Callable[..., Any], has_file: bool
) -> None:
    """With the program ``file`` in the image or not, which Triton's keys follow; libcuda comes from the host."""
    if has_file:
        (tmp_path / "bin" / "file").write_text("#!/bin/sh\necho ELF 64-bit LSB pie executable, dynamically linked\n")
        (tmp_path / "bin" / "file").chmod(0o755)
    done = image(EPFUSE_KERNELS=str(made[0]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] == ("ELF" if has_file else "")
    assert sorted(found["compiled"]) == [[name, True] for name in KERNEL_NAMES]
    assert found["launched"] == 5 * len(KERNEL_NAMES)
    assert found["late"] == 0
    assert "can't be kept" not in done.stderr  # a process that finds all there needs no other folder
    assert not [*(tmp_path / "tmp").iterdir()]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "Failed to find C compiler."),
        ({"TRITON_HOME": ""}, "Failed to find C compiler."),
        ({"CC": "no-such-compiler"}, "No such file or directory: 'no-such-compiler'; install gcc"),
        ({"CC": shutil.which("false") or ""}, "false' failed with exit code 1; install gcc"),
        ({"CC": shutil.which("true") or ""}, "No such file or directory: "),
    ],
    ids=["home can't be written", "home can", "CC is not there", "CC fails", "CC makes nothing"],
)
def test_an_image_without_a_compiler_and_a_bundle_says_what_lacks(
    tmp_path: Path, image: Callable[..., Any], variables: dict[str, str], words: str
) -> None:
    done = image(**{name: value or str(tmp_path) for name, value in variables.items()})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("epfuse.errors.MissingDependency: Triton can't make here what launches a kernel: ")
    assert words in last
    assert "EPFUSE_KERNELS" in last


def test_a_home_that_can_not_be_written_has_what_processes_beside_this_one_compiled(
    tmp_path: Path, image: Callable[..., Any]
) -> None:
    """In the temporary folder of this process, not in one of their own each, for nobody."""
    done = image(PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["compiled"]) == [[name, True] for name in KERNEL_NAMES]
    assert done.stderr.count("can't be kept") == 1
    assert len([*(tmp_path / "tmp").glob("epfuse-kernels-*")]) == 1


def _damaged(bundle: Path, to: Path, **changes: object) -> Path:
    copy = shutil.copytree(bundle, to)
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | changes))
    return copy


@pytest.mark.parametrize(
    ("name", "value"), [("triton", "3.5.0"), ("sources", "0" * 64), ("abi", "cpython-39-x86_64-linux-gnu")]
)
def test_a_stale_bundle_is_refused(made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"compiled with {name} {value}, and here is .*make them again"):
        Bundle.read(_damaged(made[0], tmp_path / "stale", **{name: value}))


@pytest.mark.parametrize("changes", [{"files": {"../../etc/passwd": "0"}}, {"files": []}, {"more": 1}])
def test_a_hostile_manifest_is_refused(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="manifest"):
        Bundle.read(_damaged(made[0], tmp_path / "hostile", **changes))


def test_a_changed_file_is_not_used(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(made[0], tmp_path / "changed")
    victim = next((copy / KERNELS).glob("*/route_kernel.cubin"))
    bundle = Bundle.read(copy)
    assert bundle.file(victim.parent.name, victim.name) == victim
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    bundle = Bundle.read(copy)
    assert bundle.file(victim.parent.name, victim.name) is None
    assert f"{victim} is not what the manifest says, and is not used" in caplog.text
    assert bundle.file(victim.parent.name, "unknown") is None
