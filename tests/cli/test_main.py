"""The command line: fast help, one-line errors, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import click
import pytest
from click.testing import CliRunner

import epfuse
from epfuse.cli import main as cli
from epfuse.errors import ShapeError


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from epfuse.cli.main import main; main(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in result.stdout


def _commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[click.Command, tuple[str, ...]]]:
    yield command, words
    if isinstance(command, click.Group):
        with click.Context(command, info_name=words[-1]) as context:
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from _commands(found, (*words, name))


def test_every_help_names_the_command_and_its_examples_lie_on_lines_of_their_own() -> None:
    for command, words in _commands(cli.main, ("epfuse",)):
        result = CliRunner().invoke(cli.main, [*words[1:], "--help"])
        assert result.exit_code == 0
        assert result.output.startswith(f"Usage: {' '.join(words)} ")
        assert "\\b" not in result.output
        if not isinstance(command, click.Group):
            assert re.search(rf"^ *(Examples?: )?{' '.join(words)}\b", result.output, re.MULTILINE), words


def test_version() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"epfuse, version {epfuse.__version__}\n")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Add a command named ``serve`` whose module answers the import with what is given."""

    def install(answer: object) -> None:
        def import_module(name: str) -> object:
            assert name == "epfuse.cli.serve"
            if isinstance(answer, Exception):
                raise answer
            return type("Module", (), {"serve": answer})

        monkeypatch.setitem(cli.COMMANDS, "serve", "")
        monkeypatch.setattr(cli.importlib, "import_module", import_module)

    return install


def test_an_error_of_epfuse_is_one_line_on_stderr(serve: Callable[[object], None]) -> None:
    @click.command()
    def command() -> None:
        raise ShapeError("hidden has shape (3,); it must have two dimensions")

    serve(command)
    result = CliRunner().invoke(cli.main, ["serve"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "epfuse: hidden has shape (3,); it must have two dimensions\n"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("epfuse.cli.serve", "is not part of this version"),
        ("fastapi", "needs the package 'fastapi', which is not installed"),
    ],
)
def test_a_command_that_can_not_be_loaded(serve: Callable[[object], None], missing: str, words: str) -> None:
    serve(ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    result = CliRunner().invoke(cli.main, ["serve"])
    assert result.exit_code == 2
    assert words in result.stderr


def test_unknown_command() -> None:
    result = CliRunner().invoke(cli.main, ["frobnicate"])
    assert result.exit_code == 2
    assert "No such command 'frobnicate'" in result.stderr
