"""Kernels lie where the next process looks, whoever moves Triton's folder meanwhile; each case is a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from epfuse import kernel_cache
from epfuse.environment import environment
from epfuse.errors import NotCompiled
from epfuse.kernel_cache import KernelCache

PROGRAM = Path(__file__).parent / "cache.py"
ROOT = Path(__file__).parents[2]
MOVERS = ("TRITON_CACHE_DIR", "TRITON_INTERPRET", "EPFUSE_KERNELS", "EPFUSE_NO_COMPILE", "TRITON_HOME")


def run(home: Path, way: str, **variables: str) -> tuple[dict[str, Any], str]:
    """What a process did that compiled a kernel of epfuse's and one of somebody else's, and its log."""
    kept = {name: value for name, value in os.environ.items() if name not in MOVERS}
    environment = {**kept, "HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"), **variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), way], env=environment, capture_output=True, text=True, timeout=300
    )
    return json.loads(done.stdout or "{}"), done.stderr


def test_what_inductor_moves_is_not_ours(tmp_path: Path) -> None:
    """The cause of what a server compiled again: inductor sets TRITON_CACHE_DIR in the process that makes a kernel."""
    first, _ = run(tmp_path, "inductor")
    assert first["moved"] == str(tmp_path / "inductor" / "triton" / "0")
    assert first["compiled"] == [["stranger", False], ["combine_kernel", False]]
    second, _ = run(tmp_path, "plain")
    assert second["moved"] is None
    assert second["compiled"] == [["stranger", False], ["combine_kernel", True]]
    assert first["launched"] == second["launched"] == 2
    # a child of the first process inherits the variable
    assert kernel_cache._is_inductors("tmp/torchinductor_me/triton/0")
    assert not kernel_cache._is_inductors(str(tmp_path / "inductor" / "triton" / "0"))  # not in this process


def test_what_the_user_sets_governs(tmp_path: Path) -> None:
    found, _ = run(tmp_path / "home", "inductor", TRITON_CACHE_DIR=str(tmp_path / "given"))
    assert found["moved"] == str(tmp_path / "given")
    assert list((tmp_path / "given").glob("*/combine_kernel.cubin"))
    assert not (tmp_path / "home" / ".triton").exists()


def test_a_folder_that_can_not_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernel_cache, "_AT_START", str(tmp_path / "file" / "kernels"))
    kernel_cache.folder.cache_clear()
    try:
        found = kernel_cache.folder()
    finally:
        kernel_cache.folder.cache_clear()
    assert found.is_dir()
    found.rmdir()
    assert f"compiled kernels can't be kept in {tmp_path}/file/kernels (Not a directory) but in {found}" in caplog.text
    assert "EPFUSE_KERNELS" in caplog.text


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KernelCache]:
    """An empty cache, after a warm-up."""
    environment.cache_clear()
    monkeypatch.setattr(KernelCache, "place", tmp_path)
    cache = KernelCache("key")
    monkeypatch.setattr(KernelCache, "place", None)
    before = kernel_cache.late_compiles()
    kernel_cache.say_ready()
    yield cache
    kernel_cache.say_ready(False)
    kernel_cache._Late.count = before
    environment.cache_clear()


def test_a_late_compile_is_counted(warmed: KernelCache, caplog: pytest.LogCaptureFixture) -> None:
    before = kernel_cache.late_compiles()
    assert warmed.get_group("combine_kernel.json") is None
    assert kernel_cache.late_compiles() == before + 1
    assert "kernel combine_kernel is compiled while requests wait for it" in caplog.text


def test_a_late_compile_can_be_an_error(warmed: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPFUSE_NO_COMPILE", "1")
    with pytest.raises(NotCompiled, match="kernel combine_kernel is not compiled, and EPFUSE_NO_COMPILE=1 forbids"):
        warmed.get_group("combine_kernel.json")


def test_nothing_is_looked_for_after_a_warm_up(tmp_path: Path) -> None:
    """Calls of any T, offsets and workspaces find every kernel loaded, and the warm-up what it has compiled itself."""
    found, said = run(tmp_path, "warm", EPFUSE_NO_COMPILE="1")
    assert found, said
    assert len(found["compiled"]) == found["before"] > 0  # as Triton's listener sees it
    assert all(hit for _, hit in found["compiled"])  # processes beside this one compile
    assert found["launched"] >= 25 * 4
    assert found["said"][0] == "compiling 4 of 4 kernels for 1 to 2 tokens"
    assert "4 kernels for 1 to 2 tokens are loaded" in found["said"][-1]
