"""Files from outside: bounded in bytes and seconds, and every failure is ours."""

from __future__ import annotations

import os
import pty
import threading
import time
from pathlib import Path

import pytest

from epfuse import input_file
from epfuse.errors import ConfigError
from epfuse.input_file import read_file, read_json, read_object


def test_reads_files_and_pipes(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "file").write_bytes(data)
    assert read_file(tmp_path / "file", "record") == data
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write, data[:65536]), os.close(write)))
    writer.start()
    assert read_file(Path(f"/dev/fd/{read}"), "record") == data[:65536]  # what <(command) hands over
    writer.join()
    os.close(read)


def test_a_pipe_without_a_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_file, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "fifo")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="nothing came"):
        read_file(tmp_path / "fifo", "record")
    ours, theirs = pty.openpty()
    with pytest.raises(ConfigError, match="nothing came"):
        read_file(Path(os.ttyname(theirs)), "record")
    assert time.monotonic() - begin < 5
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("name", ["no-such-file", "folder", "loop", "a\0b"])
def test_what_can_not_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"record .* can't be read"):
        read_file(tmp_path / name, "record")


def test_a_file_without_an_end_is_left_at_the_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 4096 bytes"):
        read_file(Path("/dev/zero"), "record", 4096)
    (tmp_path / "file").write_bytes(b"x" * 4096)
    assert len(read_file(tmp_path / "file", "record", 4096)) == 4096


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b"1" * 5000, b'{"a": \x00}', b"\xed\xa0\x80"]
)
def test_what_is_no_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ConfigError, match=r"record .* is (not JSON|nested too deeply)"):
        read_json(tmp_path / "file", "record")


def test_json(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1, "\\ud800", Infinity]}')
    assert read_json(tmp_path / "file", "record") == {"a": [1, "\ud800", float("inf")]}


def test_objects_are_read_in_one_way_only(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": "\xc3\xa9"}]}')
    assert read_object(path, "config") == {"a": [1, {"b": "é"}]}
    for text in (
        b'{"a": 1, "a": 1}',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b"[" * 9999,
    ):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"config\.json is (not JSON|nested too deeply)"):
            read_object(path, "config")
    path.write_bytes(b"[]")
    with pytest.raises(ConfigError, match="is a list; it must be an object"):
        read_object(path, "config")
