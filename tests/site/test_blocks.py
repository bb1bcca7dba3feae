"""The code blocks of the documentation: what can be run without a GPU is run, the rest is at least well formed."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from tools.site.root_pages import ROOT

from epfuse.cli.main import main
from tests.site.conftest import outside

BLOCK = re.compile(r"^```(?P<language>[\w-]+)(?: (?P<options>[^\n]*))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = 'title="runs in CI"'
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    options: str
    text: str


def blocks() -> Iterator[Block]:
    for file in sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]):
        for found in BLOCK.finditer(file.read_text(encoding="utf-8")):
            yield Block(str(file.relative_to(ROOT)), found["language"], found["options"] or "", found["text"])


BLOCKS = list(blocks())
RUNNING = [block for block in BLOCKS if block.options == RUN]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell block, without leading variables, comments and where its output goes."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            ends = [index for index, word in enumerate(words) if word in (">", ">>", "|", "&&")]
            yield words[: min(ends, default=len(words))]


def check_epfuse(words: list[str]) -> None:
    """Refuse a command line of ``epfuse`` that click would not parse; files need not be there."""
    command, path = main, ["epfuse"]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        with click.Context(command, info_name=path[-1]) as context:
            found = command.get_command(context, rest[0])
        assert found is not None, f"{' '.join(path)} has no command {rest[0]}"
        command, path, rest = found, [*path, rest[0]], rest[1:]
    if isinstance(command, click.Group) or {"--help", "-h"} & set(rest):
        return
    with click.Context(command, info_name=path[-1]) as context:
        values, _, _ = command.make_parser(context).parse_args(list(rest))
        for parameter in command.params:
            value = values.get(parameter.name or "")
            if isinstance(parameter.type, click.Choice) and isinstance(value, str):
                parameter.type_cast_value(context, value)


def test_there_are_blocks_of_each_kind() -> None:
    assert {block.language for block in RUNNING} == {"sh", "python"}
    assert {block.page.split("/")[1] for block in RUNNING} == {"howto", "start"}
    started = {block.page for block in RUNNING} | {"docs/start/your-code.md"}  # its block is README's, which is tested
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "docs" / "start").glob("*.md")} <= started


@pytest.mark.parametrize("language", ["sh", "python", "json", "yaml"])
def test_every_block_is_well_formed(language: str) -> None:
    for block in BLOCKS:
        if block.language != language:
            continue
        if language == "python":
            ast.parse(block.text, block.page)
        elif language == "json":
            json.loads(block.text)
        elif language == "yaml":
            yaml.safe_load(block.text)
        else:
            for words in commands(block.text):
                try:
                    if words[0] == "epfuse":
                        check_epfuse(words)
                    elif words[0] == "make":
                        goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
                        assert set(goals) <= TARGETS
                except (AssertionError, click.ClickException) as error:
                    raise AssertionError(f"{block.page}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("line", ["epfuse nonsense", "epfuse plan --nonsense", "epfuse plan --device toaster"])
def test_a_wrong_line_is_found(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException)):
        check_epfuse(line.split())


@pytest.mark.parametrize(
    "block",
    {block.text: block for block in RUNNING}.values(),
    ids=lambda block: f"{block.page}:{block.text.splitlines()[0][:40]}",
)
def test_what_runs_in_ci(block: Block, tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    settings = {**outside(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-ec", block.text]
    ended = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
