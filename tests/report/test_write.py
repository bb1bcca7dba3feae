"""The one writer: atomic for files, through what is none, and refused before the work."""

from __future__ import annotations

import ast
import os
import pty
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.report.write import check_output, check_output_folder, remove_leftovers, replacing, write_atomic

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("data", ["héllo\n", b"\x00\xff"])
def test_writes_text_and_bytes(tmp_path: Path, data: str | bytes) -> None:
    path = write_atomic(tmp_path / "report", data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["report"]


def test_a_lone_surrogate_becomes_an_escape(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / "report", "name \udcff").read_text() == "name \\udcff"


def test_replaces_and_keeps_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    path.chmod(0o640)
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomic(tmp_path / "report", "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, "--html")
    assert write_atomic(tmp_path / name, "x").read_text() == "x"
    with pytest.raises(ConfigError, match="File name too long"):
        check_output(tmp_path / f"{name}xxxx", "--html")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report"
    path.write_text("old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_that_ends_early_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as file:  # noqa: PT012
        file.write(b"half of")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report"]


def test_a_folder_that_can_not_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert write_atomic(tmp_path / "report", "new").read_text() == "new"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "report", "x")


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("hops", [1, 2])
def test_links_are_followed_and_stay(tmp_path: Path, exists: bool, hops: int) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    target, link = folder / "report", tmp_path / "link"
    if exists:
        target.write_text("old")
    if hops == 2:
        (tmp_path / "between").symlink_to(target)
        target = tmp_path / "between"
    link.symlink_to(target)
    check_output(link, "--html")
    write_atomic(link, "new")
    assert link.is_symlink()
    assert (folder / "report").read_text() == "new"
    assert os.listdir(folder) == ["report"]


def test_a_ring_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        write_atomic(tmp_path / "a", "x")
    with pytest.raises(ConfigError, match="Too many levels"):
        check_output(tmp_path / "a", "--html")


def test_a_fifo_is_written_through(tmp_path: Path) -> None:
    fifo, data = tmp_path / "fifo", "x" * 200_000  # more than a pipe holds
    os.mkfifo(fifo)
    check_output(fifo, "--html")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = threading.Thread(target=write_atomic, args=(fifo, data))
    writer.start()
    os.set_blocking(reader, True)
    with os.fdopen(reader, "rb") as file:
        while not (found := file.read()):  # the end, until the writer has opened it
            pass
    writer.join(10)
    assert found.decode() == data
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_fifo_that_nobody_reads_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address"):
        write_atomic(tmp_path / "fifo", "x")


def test_a_character_device_stays_one(tmp_path: Path) -> None:
    """A terminal of our own, and one behind a link: nothing is ever tried on a device of the machine."""
    ours, theirs = pty.openpty()
    link = tmp_path / "device"
    link.symlink_to(os.ttyname(theirs))
    for path in (link, Path(os.ttyname(theirs))):
        check_output(path, "--html")
        write_atomic(path, "hello\n")
        assert os.read(ours, 100) == b"hello\r\n"
        assert stat.S_ISCHR(path.stat().st_mode)
    assert link.is_symlink()
    os.close(ours)
    os.close(theirs)


def test_the_file_behind_stdout_is_written_where_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "from pathlib import Path; from epfuse.report.write import write_atomic\n"
        "print('before'); write_atomic(Path('/dev/stdout'), 'report\\n'); print('after')"
    )
    with out.open("w") as stdout:
        subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
    assert out.read_text() == "before\nreport\nafter\n"


def test_a_file_whose_name_is_gone_is_written_by_its_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "gone").open("w+b") as file:
        (tmp_path / "gone").unlink()
        write_atomic(Path(f"/proc/self/fd/{file.fileno()}"), "x")
        assert os.listdir(tmp_path) == []
        file.seek(0)
        assert file.read() == b"x"


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write everything
    with pytest.raises(PermissionError):
        write_atomic(path, "new")
    with pytest.raises(ConfigError, match="Permission denied"):
        check_output(path, "--html")
    assert path.read_text() == "old"


def test_what_can_not_be_written_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "report", "does not exist; make it first"),
        (tmp_path / "file" / "report", "Not a directory"),
        (Path("/proc/report"), "can't be written"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            check_output(path, "--html")
        assert "--html is" in str(caught.value)
    check_output(tmp_path / "file", "--html")
    check_output(tmp_path / "new", "--html")
    check_output_folder(tmp_path / "a" / "b", "--out")
    for folder in (tmp_path / "file", tmp_path / "file" / "a", Path("/proc/a")):
        with pytest.raises(ConfigError, match="--out is"):
            check_output_folder(folder, "--out")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    for name in ("report", "reports", ".report.0123", ".reports.0123"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "report")
    assert sorted(os.listdir(tmp_path)) == [".reports.0123", "report", "reports"]


OWN_WRITERS = {
    "src/epfuse/report/write.py": "the writer",
    "src/epfuse/aot/sass.py": "input of a disassembler, in a temporary folder of its own",
    "src/epfuse/parallel/launch.py": "a failing rank's note, in a folder of the launcher's own",
    "src/epfuse/demo/checkpoint.py": "a new folder, made aside, synced and renamed when it is whole",
    "src/epfuse/demo/progress.py": "appends to a channel between processes",
    "src/epfuse/integrations/vllm/patch/swap.py": "swaps vLLM's files under a journal, with kills tested",
    "src/epfuse/cli/exits.py": "the null device, in place of a stdout that is closed",
    "src/epfuse/parallel/watch.py": "appends where a rank is, for the launcher",
    "tools/serve_on_gpu/bench.py": "a process' log, appended to while it runs",
    "tools/serve_on_gpu/plugin.py": "a line for each kernel, appended while vLLM runs",
    "tools/beside_peers.py": "a harness in a temporary folder of its own",
    "tools/peer_layers.py": "harnesses and their tasks in a temporary folder of its own",
    "tools/vllm_cpu.py": "makes an environment, before epfuse is in it",
    "src/epfuse/compiled/launchers.py": "what a linker reads, in a temporary folder of its own",
    "src/epfuse/compiled/warm_up.py": "a lock that ranks of one host share",
    "src/epfuse/doctor/child.py": "the null device, in place of a check's stdout",
    "src/epfuse/doctor/compiling.py": "a compiler's input, in a temporary folder of its own",
    "src/epfuse/cli/serve/cancel.py": "an empty file that is there or not",
    "src/epfuse/serving/claim.py": "claims and ends, made aside and renamed, with kills tested; a phase to read",
    "src/epfuse/serving/client.py": "a client's log, appended to while it runs",
    "src/epfuse/serving/dispatch.py": "puts an earlier attempt's end away, under the journal",
    "src/epfuse/serving/journal.py": "appends checksummed lines, with kills tested",
    "src/epfuse/serving/launchers/processes.py": "locks a start; a job's log, appended to while it runs",
    "src/epfuse/serving/lock.py": "a lock",
    "src/epfuse/serving/node.py": "a sample a second, appended while a job runs",
    "src/epfuse/serving/plugin.py": "a plugin's metadata, in a folder of the job's own",
    "src/epfuse/serving/server.py": "a server's log, appended to while it runs",
    "src/epfuse/aot/isa/lds.py": "touches memory of the model, no file",
    "src/epfuse/aot/isa/vmem.py": "touches memory of the model, no file",
    "tools/serve_on_gpu/memory.py": "a sample twice a second, appended while a server runs",
    "tools/server_releases.py": "renames a folder that it has unpacked",
}
WRITERS = {"write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", "dump", "rename", "touch"}


def _writes(call: ast.Call) -> bool:
    """Whether a call opens, makes or renames a file for writing, as far as its name and mode say."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name == "open":
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        flags = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
        return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}) or any(set("wax+") & set(str(mode)) for mode in modes)
    return name in WRITERS or (of == "os" and name == "replace")


def test_nobody_else_writes_files() -> None:
    found = set()
    for file in [*ROOT.glob("src/epfuse/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        if "gpu_suite" in file.parts:  # logs of a run by hand, appended to while it goes on
            continue
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.Call) and _writes(node) for node in ast.walk(tree)):
            found.add(file.relative_to(ROOT).as_posix())
    assert found <= set(OWN_WRITERS)
