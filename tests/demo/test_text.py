from __future__ import annotations

from pathlib import Path

import pytest

from epfuse.demo.text import BOS, decode, encode, read_text
from epfuse.errors import ConfigError


def test_bytes_there_and_back() -> None:
    assert encode("né".encode(), 10) == [BOS, 110, 195, 169]
    assert decode(encode("né".encode(), 10)) == "né"


def test_no_more_tokens_than_asked_for() -> None:
    assert encode(b"abcdef", 4) == [BOS, *b"abc"]
    assert encode(b"abcdef", 1) == [BOS]


def test_a_broken_byte_does_not_break_decoding() -> None:
    assert decode([195, 110]) == "\ufffdn"


def test_reads_the_file_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xff some bytes")
    assert read_text(path).data == b"\xff some bytes"


def test_has_a_text_without_one_being_named() -> None:
    text = read_text(None)
    assert len(text.data) > 256
    assert text.source


@pytest.mark.parametrize("content", [None, b""])
def test_refuses_a_file_without_text(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        read_text(path)
