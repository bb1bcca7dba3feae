"""Every error with its cause and what mends it, and how commands end: from the docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
from pathlib import Path

from tools.site.root_pages import ROOT

import epfuse.errors
from epfuse import environment
from epfuse.cli import exits
from epfuse.errors import EpfuseError
from epfuse.integrations import switches

SOURCE = ROOT / "src"


def kinds() -> list[type[EpfuseError]]:
    """Every class of errors, in the order of their modules' names, `epfuse.errors` first."""
    for file in sorted((SOURCE / "epfuse").rglob("*.py")):
        if "Error):" in file.read_text(encoding="utf-8"):
            importlib.import_module(".".join(file.relative_to(SOURCE).with_suffix("").parts))
    found: list[type[EpfuseError]] = []
    waiting = [EpfuseError]
    while waiting:
        kind = waiting.pop(0)
        found.append(kind)
        waiting += kind.__subclasses__()
    ours = [kind for kind in dict.fromkeys(found) if kind.__module__.startswith("epfuse.")]
    return sorted(ours, key=lambda kind: kind.__module__ != epfuse.errors.__name__)


def cause_and_fix(kind: type[EpfuseError]) -> tuple[str, str]:
    """What an error's docstring says: its first paragraph, and the one that begins with ``Fix:``.

    Raises:
        ValueError: there is no such paragraph.
    """
    paragraphs = [" ".join(text.split()) for text in (inspect.getdoc(kind) or "").split("\n\n")]
    fixes = [text.removeprefix("Fix:").strip() for text in paragraphs if text.startswith("Fix:")]
    if len(fixes) != 1:
        raise ValueError(f"{kind.__module__}.{kind.__name__} has {len(fixes)} paragraphs 'Fix:' in its docstring")
    return paragraphs[0], fixes[0]


def pages() -> dict[str, str]:
    """Page -> its text."""
    return {
        "reference/errors.md": _errors(),
        "reference/environment.md": _environment(),
        "reference/exit-codes.md": _exit_codes(),
    }


def _errors() -> str:
    lines = [
        "# Errors",
        "",
        "All that epfuse refuses is an `epfuse.EpfuseError`, which is a `ValueError`. The message names the argument,"
        " what it got and what it needs. A command prints it in one line and ends with [exit code 2](exit-codes.md).",
        "",
    ]
    for kind in kinds():
        cause, fix = cause_and_fix(kind)
        (base, *_) = kind.__bases__
        lines += [f"## {kind.__name__} {{ #{kind.__name__} }}", "", f"`{kind.__module__}.{kind.__name__}`"]
        lines += [f"({base.__name__})", "", f"**Cause.** {cause}", "", f"**Fix.** {fix[0].upper()}{fix[1:]}", ""]
    return "\n".join(lines).replace("``", "`")


def _environment() -> str:
    lines = ["# Environment variables", "", inspect.getdoc(environment) or "", "", "## Of the plugins for servers", ""]
    lines += ["| variable | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in _constants(Path(switches.__file__)).items()]
    return "\n".join([*lines, "", f"`0` or nothing is off, `1` is on. {inspect.getdoc(switches)}", ""])


def _constants(file: Path) -> dict[str, str]:
    """Value of each string constant of a module -> the text below it."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = {}
    for constant, text in itertools.pairwise(body):
        match constant, text:
            case (
                ast.Assign(value=ast.Constant(value=str(value))),
                ast.Expr(value=ast.Constant(value=str(said))),
            ):
                found[value] = said
    return found


def _exit_codes() -> str:
    return f"# Exit codes\n\n{inspect.getdoc(exits)}\n"
