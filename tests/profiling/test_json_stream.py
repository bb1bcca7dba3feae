"""The reader's JSON: any layout, any place where a chunk ends, and clear errors for what is no trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse.errors import TraceError
from epfuse.profiling import json_stream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), max_size=6)


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    other: dict[str, Any] = {}
    return list(json_stream.stream_events(path, other.__setitem__)), other


@given(EVENTS, VALUES, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_reads_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory,
    events: list[dict[str, Any]],
    value: Any,
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    zipped: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "trace"
    text = json.dumps({"before": value, "traceEvents": events, "after": 1}, indent=indent, ensure_ascii=ascii_only)
    data = text.encode("utf-8", "surrogatepass" if ascii_only else "replace")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        got, other = read(path)
    expected = json.loads(data.decode("utf-8", "replace"))
    assert got == expected["traceEvents"]
    assert other == {"before": expected["before"], "after": 1}


def test_a_bare_array_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[{"name": "a"}, {"name": "b"}]')
    assert [event["name"] for event in read(path)[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "must begin with an object or an array"),
        (b"\x00\xff\x17", "must begin with an object or an array"),
        (b'"text"', "must begin with an object or an array"),
        (b"{}", "has no 'traceEvents'"),
        (b'{"displayTimeUnit": "ms"}', "has no 'traceEvents'"),
        (b'{"traceEvents": 3}', "'[' must stand here"),
        (b'{"traceEvents": [1]}', "an event must be an object"),
        (b'{"traceEvents": [{}, ]}', "an event must be an object"),
        (b'{"traceEvents": [{} {}]}', "separated by commas"),
        (b'{"traceEvents": [{"a" 1}]                            }', "Expecting ':' delimiter"),
        (b'{"a": 1 "traceEvents": []}', "',' must stand here"),
        (b'{"a": 1, }', "a key must be a string"),
        (b'{"traceEvents": []} {"more": 1}', "there is more after the trace's end"),
        (b'{"traceEvents": [', "ends early"),
        (b'{"traceEvents": [{"name": "ker', "ends early"),
        (b'{"traceEvents": [{"name": "kernel"}', "ends early"),
        (b'{"traceEvents": [{"name": "kernel"},', "ends early"),
        (b'{"traceEvents": [{"name": "kernel"}]', "ends early"),
        (b'{"traceEvents": [{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"traceEvents": [{"a":' + b"9" * 5000 + b"}]}" + b" " * 20, "is not a JSON trace"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9], "damaged or cut short"),
        (b"\x1f\x8bnot gzip at all", "damaged or cut short"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(TraceError) as error:
        read(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_every_cut_of_a_trace_is_an_error(tmp_path: Path) -> None:
    whole = json.dumps({"schemaVersion": 1, "traceEvents": [{"name": "a", "dur": 1.5}, {"name": "b"}], "end": True})
    path = tmp_path / "cut.json"
    for length in range(1, len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(TraceError):
            read(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone.json can't be read: No such file"):
        read(tmp_path / "gone.json")
    with pytest.raises(TraceError, match="can't be read"):
        read(tmp_path)


def test_one_endless_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 64)
    monkeypatch.setattr(json_stream, "LARGEST_VALUE", 1000)
    path = tmp_path / "long.json"
    path.write_text('{"traceEvents": [{"name": "' + "x" * 5000 + '"}]}')
    with pytest.raises(TraceError, match="longer than 1000 characters"):
        read(path)


def test_progress_reaches_the_file_size(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"n": i} for i in range(100)]}).encode()))
    seen: list[tuple[int, int]] = []
    list(json_stream.stream_events(path, lambda *_: None, lambda done, total: seen.append((done, total))))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_raw_control_characters_lone_surrogates_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(
        b'\xef\xbb\xbf{"traceEvents": [{"name": "a\x01\x1b[31m\n\x00b", "x": "\\ud800", "y": "\xed\xa0\x80\xff"}]}'
    )
    (event,) = read(path)[0]
    assert (event["name"], event["x"]) == ("a\x01\x1b[31m\n\x00b", "\ud800")
