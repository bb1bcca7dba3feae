"""Installed vLLMs that something has damaged: refused in words or patched, and nothing is left half written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from epfuse import input_file
from epfuse.errors import EpfuseError
from epfuse.integrations.vllm.patch import block, run
from epfuse.integrations.vllm.patch.journal import NAME
from epfuse.integrations.vllm.patch.site import find_site
from epfuse.integrations.vllm.patch.swap import kept_link, temporary
from tests.integrations.vllm.patch.sites import TARGET, make_site, snapshot

CASES = 300
INFO = "vllm-0.25.1.dist-info"
JUNK = (b"\xff", b"\0", b'"', b",", b"\r", b"\n", b"\xed\xa0\x80", b"sha256=", b"x" * 200_000, block.BEGIN, block.BLOCK)


def bytes_changed(file: Path, chance: random.Random) -> None:
    """Junk put in, a part cut out, or the end cut off."""
    if not file.is_file():
        return
    content = file.read_bytes()
    start = chance.randrange(len(content) + 1)
    change = chance.randrange(3)
    end = len(content) if change == 2 else min(len(content), start + chance.randrange(40)) if change else start
    file.write_bytes(content[:start] + (chance.choice(JUNK) if change == 0 else b"") + content[end:])


def gone(file: Path, chance: random.Random) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def a_directory(file: Path, chance: random.Random) -> None:
    gone(file, chance)
    file.mkdir(parents=True)


def a_link(file: Path, chance: random.Random) -> None:
    """To its old self, to nothing, to itself, to a directory, to what never ends."""
    kept = file.with_name(f"{file.name}.kept")
    if file.exists() and not kept.exists():
        file.rename(kept)
    gone(file, chance)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(chance.choice([kept.name, "nowhere", file.name, os.curdir, "/dev/zero", "/dev/null"]))


def a_pipe(file: Path, chance: random.Random) -> None:
    gone(file, chance)
    file.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(file)


def patched_before(file: Path, chance: random.Random) -> None:
    if file.is_file():
        file.write_bytes(file.read_bytes() + block.BLOCK)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *[bytes_changed] * 8,
    gone,
    a_directory,
    a_link,
    a_link,
    a_pipe,
    patched_before,
)


def places(root: Path) -> list[Path]:
    target = root / TARGET
    ours = [temporary(target), kept_link(target), root / INFO / NAME, temporary(root / INFO / NAME)]
    return [*[root / INFO / "RECORD", root / INFO / "METADATA", target] * 3, *ours, root / INFO, target.parent]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    make_site(root)
    return root


@pytest.mark.parametrize("part", range(10))
def test_damaged_sites_are_refused_in_words_or_patched(part, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is no part of this
    monkeypatch.setattr(input_file, "PATIENCE", 0.01)
    wheels = (pristine / TARGET).read_bytes()
    for number in range(part, CASES, 10):
        chance, root = random.Random(number), tmp_path / str(number)
        shutil.copytree(pristine, root)
        for _ in range(chance.choice([1, 1, 2, 3])):
            with suppress(OSError):  # below what an earlier damage made a file of
                chance.choice(DAMAGES)(chance.choice(places(root)), chance)
        target = root / TARGET
        for action in chance.sample([run.apply, run.revert, run.status], 3):
            before = content_of(target)
            try:
                action(find_site(root))
            except EpfuseError:
                pass
            else:
                assert not (root / INFO / NAME).exists() or action is run.status, number
            assert content_of(target) in (before, wheels, wheels + block.BLOCK), number
        shutil.rmtree(root)


def content_of(file: Path) -> bytes | None:
    """None of what is no file."""
    return file.read_bytes() if file.is_file() else None


def test_mutations_reach_what_matters(pristine, tmp_path):
    """Not a fuzzer that damages nothing: most cases are refused, some are patched."""
    outcomes = []
    for number in range(0, CASES, 10):
        chance, root = random.Random(number), tmp_path / str(number)
        shutil.copytree(pristine, root)
        chance.choice(DAMAGES[:10])(chance.choice(places(root)[:9]), chance)
        before = snapshot(root)
        try:
            outcomes.append(run.status(find_site(root)).state)
        except EpfuseError:
            outcomes.append(None)
        assert snapshot(root) == before
    assert len(set(outcomes)) >= 3
