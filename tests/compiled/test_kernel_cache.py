"""Kernels lie where the next process looks, whoever moves Triton's folder meanwhile; each case is a process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.cache import get_cache_manager

from epfuse import kernel_cache
from epfuse.compiled import warm_up
from epfuse.environment import environment
from epfuse.errors import ConfigError, MissingDependency, NotCompiled
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


def test_where_nothing_can_be_written_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernel_cache, "_AT_START", str(tmp_path / "file" / "kernels"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    kernel_cache.folder.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"kernels \(Not a directory\), nor in a temporary folder \(No such"):
            kernel_cache.folder()
    finally:
        kernel_cache.folder.cache_clear()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (RuntimeError("Cannot find ptxas"), MissingDependency),
        (RuntimeError("Failed to find C compiler. Please .."), MissingDependency),  # a launcher's, up to triton 3.6
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), MissingDependency),
        (FileNotFoundError(2, "No such file or directory", "a-compiler"), MissingDependency),
        (PermissionError(13, "Permission denied", "a-compiler"), MissingDependency),  # a folder, or may not be run
        (FileNotFoundError(2, "No such file or directory", "k.cubin"), FileNotFoundError),  # of a folder that went
        (RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError),
    ],
)
def test_a_tool_that_a_compile_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, said: Exception, kind: type[Exception]
) -> None:
    monkeypatch.setenv("CC", "a-compiler")

    def compile_kernel() -> None:
        raise said

    with pytest.raises(kind) as found:
        kernel_cache._through_cache(compile_kernel)()
    assert type(found.value) is kind
    assert ("EPFUSE_KERNELS" in str(found.value)) == (kind is MissingDependency)


def test_an_error_that_names_no_file_is_no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)

    def compile_kernel() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as found:
        kernel_cache._through_cache(compile_kernel)()
    assert type(found.value) is OSError


def test_a_home_that_may_not_be_entered_is_one_that_can_not_be_written(tmp_path: Path) -> None:
    """An image's home is often root's, whoever the process runs as; asking what is in there is an error."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    is_root = os.geteuid() == 0
    if is_root:  # may enter any
        os.setresuid(65534, 65534, 0)
    try:
        assert not kernel_cache._can_be_written(closed / ".triton" / "cache")
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


class _Active:
    """Triton's driver, which keeps a module that it compiles in C."""

    def __init__(self) -> None:
        self._active, self.kept = None, list[str]()

    @property
    def active(self) -> _Active:
        return self

    def get_current_target(self) -> None:
        self.kept.append(get_cache_manager("ab").put(b"code", "cuda_utils.so"))


@pytest.mark.parametrize("readable", [True, False])
def test_tritons_driver_is_kept_where_kernels_are_if_its_own_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    driver = _Active()
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernel_cache, "driver", driver)
    monkeypatch.setattr(kernel_cache, "_AT_START", str(tmp_path / ("new" if readable else "file") / "kernels"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kernel_cache.folder.cache_clear()
    try:
        kernel_cache._take_driver()
    finally:
        kernel_cache.folder.cache_clear()
    kept = [Path(file).relative_to(tmp_path).parts for file in driver.kept]
    assert [(place[:15], file) for place, _, file in kept] == (
        [] if readable else [("epfuse-kernels-", "cuda_utils.so")]
    )
    assert readable == (not list(tmp_path.glob("epfuse-kernels-*")))
    assert not (tmp_path / "new").exists()  # nothing is made before a kernel is


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


@pytest.mark.parametrize(
    ("name", "content"),
    [("k.cubin", b""), ("k.json", b""), ("k.json", b'{"name": "k", "num_'), ("__grp__k.json", b"")],
)
def test_what_was_never_written_out_is_compiled_again(tmp_path: Path, name: str, content: bytes) -> None:
    """A machine that went down leaves files that have their names and not their bytes."""
    with kernel_cache.kernels_in(tmp_path):
        cache = get_cache_manager("0" * 64)
        files = {file: cache.put(data, file) for file, data in (("k.json", b'{"name": "k"}'), ("k.cubin", b"ELF"))}
        cache.put_group("k.json", files)
        assert cache.get_group("k.json") == files
        (Path(cache.cache_dir) / name).write_bytes(content)
        assert cache.get_group("k.json") is None


def test_a_warm_up_asks_for_its_own_thread_alone(warmed: KernelCache) -> None:
    """A call of another thread compiles what it needs."""
    kernel_cache.say_ready(False)
    with kernel_cache.only_asking():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(warmed.get_group, "combine_kernel.json").result() is None
        with pytest.raises(kernel_cache.KernelMissing):
            warmed.get_group("combine_kernel.json")
    assert warmed.get_group("combine_kernel.json") is None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two processes of a host that warm up for the same layer at the same time: who compiled, then who waited."""
    home = tmp_path_factory.mktemp("home")
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: run(home, "warm", EPFUSE_NO_COMPILE="1"), range(2)))
    assert all(found for found, _ in ended), ended
    return sorted((found for found, _ in ended), key=lambda found: -len(found["said"]))


def test_nothing_is_looked_for_after_a_warm_up(ranks: list[dict[str, Any]]) -> None:
    """Calls of any T, offsets and workspaces find every kernel loaded, and the warm-up what it has compiled itself."""
    for found in ranks:
        assert len(found["compiled"]) == found["before"] > 0  # as Triton's listener sees it
        assert all(hit for _, hit in found["compiled"])  # processes beside this one compile
        assert found["launched"] >= 25 * 4
        assert "4 kernels for 1 to 2 tokens are loaded" in found["said"][-1]


def test_ranks_of_one_host_compile_each_kernel_once(ranks: list[dict[str, Any]]) -> None:
    compiled, waited = ranks
    progress = [f"{count} of 4 kernels are compiled" for count in range(1, 5)]
    assert compiled["said"][:-1] == ["compiling 4 of 4 kernels for 1 to 2 tokens", *progress]
    assert len(waited["said"]) == 1
    assert compiled["pythons"] > 0
    assert waited["pythons"] == 0  # where there is nothing to compile no process is begun
    assert waited["cpu_s"] < 3  # what a server with a filled cache may take


def test_a_process_that_finds_all_kernels_looks_for_each_once(tmp_path: Path) -> None:
    """As a server does that another one was here before: nothing is asked beforehand, and no lock is taken."""
    run(tmp_path, "warm")
    found, _ = run(tmp_path, "warm", EPFUSE_NO_COMPILE="1")
    assert found["before"] == len({tuple(line) for line in found["compiled"]}) == 4
    assert found["pythons"] == 0
    assert len(found["said"]) == 1
    assert "4 kernels for 1 to 2 tokens are loaded" in found["said"][0]


def test_every_kernel_goes_through_it() -> None:
    """One that did not would be launched by a warm-up, on tensors without memory."""
    found = {}
    for file in sorted((ROOT / "src/epfuse/stages").rglob("kernel*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found[node.name] = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
    assert len(found) > 15
    assert {name for name, decorators in found.items() if decorators[0] != "cached"} == set()


def test_progress_is_said_a_few_times() -> None:
    said = list[str]()
    for count in range(1, 40):
        warm_up._progress(said.append, 39, count)
    assert said == [f"{count} of 39 kernels are compiled" for count in (7, 14, 21, 28, 35, 39)]
