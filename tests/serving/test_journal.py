from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epfuse.errors import ConfigError
from epfuse.serving.journal import ENDS, NEXT, SENT, Journal, PointState, read_journal
from epfuse.serving.layout import RunFolder
from tests.serving.small_runs import make_run, open_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run", ["a", "b"])


def write(folder: RunFolder) -> None:
    lock, journal = open_run(folder)
    with lock, journal:
        journal.change("a", PointState.SUBMITTING, attempt=1, place="slurm")
        journal.change("a", PointState.QUEUED, job="7")
        journal.note("slurm does not answer")
        journal.change("b", PointState.SUBMITTING, attempt=1, place="slurm")


def test_what_was_written_is_read(folder: RunFolder) -> None:
    write(folder)
    history = read_journal(folder.journal)
    a = history.points["a"]
    assert (history.run, a.state, a.attempt, a.place, a.job) == ("t", PointState.QUEUED, 1, "slurm", "7")
    assert history.points["b"].state is PointState.SUBMITTING
    assert [note.text for note in history.notes] == ["slurm does not answer"]
    assert history.accepted == {"a": 1, "b": 0}
    assert history.torn == 0


def test_an_entry_is_on_disk_when_change_returns(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, journal = open_run(folder)
    order: list[str] = []
    monkeypatch.setattr(os, "write", _named(order, "write", os.write))
    monkeypatch.setattr(os, "fsync", _named(order, "fsync", os.fsync))
    with lock, journal:
        order.clear()
        journal.note("x")
        assert order == ["write", "fsync"]


def _named(order: list[str], name: str, call):  # type: ignore[no-untyped-def]
    def named(*arguments):  # type: ignore[no-untyped-def]
        order.append(name)
        return call(*arguments)

    return named


def test_a_torn_tail_is_cut_wherever_it_tore_and_said(folder: RunFolder) -> None:
    write(folder)
    whole = folder.journal.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last + 1, len(whole), 7):
        folder.journal.write_bytes(whole[:end])
        assert read_journal(folder.journal).points["b"].state is PointState.PLANNED
        assert read_journal(folder.journal).torn == end - last
        lock, journal = open_run(folder)
        with lock, journal:
            assert journal.history.notes[-1].text.startswith(f"{end - last} bytes of a line")
            journal.change("b", PointState.SUBMITTING, attempt=1)
        assert read_journal(folder.journal).torn == 0


def test_a_last_line_whose_end_reached_the_disk_first_is_torn_too(folder: RunFolder) -> None:
    write(folder)
    whole = folder.journal.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    folder.journal.write_bytes(whole[:last] + b"\0" * 40 + whole[last + 40 :])
    history = read_journal(folder.journal)
    assert (history.torn, history.points["b"].state) == (len(whole) - last, PointState.PLANNED)


def test_a_fault_in_the_middle_names_its_line(folder: RunFolder) -> None:
    write(folder)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    for number in range(len(lines) - 1):
        for at in (0, 9, len(lines[number]) // 2, len(lines[number]) - 2):
            broken = bytearray(lines[number])
            broken[at] ^= 1
            folder.journal.write_bytes(b"".join([*lines[:number], bytes(broken), *lines[number + 1 :]]))
            with pytest.raises(ConfigError, match=rf"line {number + 1}: its checksum does not fit"):
                read_journal(folder.journal)


@pytest.mark.parametrize(("keep", "line"), [((0, 2, 3, 4), 2), ((0, 1, 1, 2, 3), 3), ((1, 2, 3), 1), ((0, 0), 2)])
def test_lines_that_are_missing_or_stand_twice_are_named(folder: RunFolder, keep: tuple[int, ...], line: int) -> None:
    write(folder)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    folder.journal.write_bytes(b"".join(lines[at] for at in keep))
    with pytest.raises(ConfigError, match=rf"line {line}: .*(missing, or stands twice|begins once)"):
        read_journal(folder.journal)


@pytest.mark.parametrize(
    "text",
    [
        '{"kind":"change","n":1,"at":1.0,"point":"c","state":"done"}',
        '{"kind":"change","n":1,"at":1.0,"point":"a","state":"unknown"}',
        '{"kind":"change","n":1,"at":1.0,"point":"a","state":"lost"}',
        '{"kind":"change","n":1,"at":NaN,"point":"a","state":"done"}',
        '{"kind":"other","n":1,"at":1.0}',
        '{"kind":"note","n":1,"at":1.0,"text":"x","more":1}',
        "[]",
        "",
        "{",
    ],
)
def test_a_line_with_a_right_checksum_that_is_no_entry_is_an_error(folder: RunFolder, text: str) -> None:
    with folder.journal.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))
    with pytest.raises(ConfigError, match="line 2"):
        read_journal(folder.journal)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300))
def test_bytes_from_anywhere_are_refused_or_torn(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = make_run(tmp_path_factory.mktemp("run") / "run", ["a"])
    with folder.journal.open("ab") as file:
        file.write(data)
    with contextlib.suppress(ConfigError):
        assert read_journal(folder.journal).torn == len(data)


def test_only_legal_transitions_are_written(folder: RunFolder) -> None:
    lock, journal = open_run(folder)
    with lock, journal:
        size = folder.journal.stat().st_size
        with pytest.raises(ConfigError, match="point a can't go from planned to unknown"):
            journal.change("a", PointState.UNKNOWN)
        assert folder.journal.stat().st_size == size


def test_every_state_has_its_transitions() -> None:
    assert set(NEXT) == set(PointState) == ENDS | SENT | {PointState.PLANNED}
    assert not NEXT[PointState.DONE]
    for state in SENT:
        assert NEXT[state] >= ENDS
    for state, after in NEXT.items():
        # nothing is submitted but what is planned, and planned again is only what is surely nowhere
        assert (PointState.SUBMITTING in after) == (state is PointState.PLANNED)
        assert (PointState.PLANNED in after) == (state in ENDS - {PointState.DONE} | {PointState.UNKNOWN})


def test_the_names_are_those_of_the_issue() -> None:
    assert [state.value for state in PointState] == [
        "planned",
        "submitting",
        "unknown",
        "queued",
        "starting",
        "warming",
        "gated_out",
        "running",
        "done",
        "failed",
        "cancelled",
    ]


def test_a_reason_with_line_ends_stays_one_line(folder: RunFolder) -> None:
    lock, journal = open_run(folder)
    with lock, journal:
        journal.change("a", PointState.FAILED, "one\ntwo\x00\u2028\x1b]0;title\x07\u202e" + "x" * 5000)
    history = read_journal(folder.journal)
    assert history.points["a"].why.startswith("one two")
    assert history.points["a"].why.isprintable()  # it is shown on terminals, and comes from logs
    assert len(history.points["a"].why) == 1000


def test_a_journal_that_has_not_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"0000")
    with pytest.raises(ConfigError, match="no whole line"):
        read_journal(tmp_path / "journal.jsonl")
    with pytest.raises(ConfigError, match="can't be read"):
        read_journal(tmp_path / "other")


def test_a_dispatcher_whose_run_was_taken_over_writes_nothing_more(folder: RunFolder) -> None:
    lock, journal = open_run(folder)
    with lock, journal:
        lock.path.write_text('{"host":"other","machine":"m","pid":1,"token":"t"}')
        size = folder.journal.stat().st_size
        with pytest.raises(ConfigError, match="taken over by process 1 on other"):
            journal.change("a", PointState.SUBMITTING, attempt=1)
        assert folder.journal.stat().st_size == size
    assert isinstance(journal, Journal)
