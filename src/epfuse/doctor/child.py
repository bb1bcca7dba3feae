"""The process that looks: one JSON line a check on stdout, and nothing else there, whatever the checks import."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence

from epfuse.doctor.finding import Answer, Finding, bad
from epfuse.errors import EpfuseError

REPORT = "report it with what 'epfuse doctor --report' prints"
LONGEST_LINE = 900


def main(checks: Sequence[tuple[str, str]]) -> None:
    """Look, check after check.

    Args:
        checks: name and ``module:function`` of each.
    """
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # libraries warn, and drivers print
        os.dup2(nowhere, stream)
    logging.lastResort = None
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        for name, look in checks:
            verdict, found, fix = answer(look)
            finding = Finding(name=name, verdict=verdict, found=one_line(found), fix=fix)
            print(finding.model_dump_json(), file=out, flush=True)
    os._exit(0)  # a broken driver may hang or crash when the interpreter ends; all is said


def answer(look: str) -> Answer:
    """What a check says; whatever it raises is an answer too."""
    try:
        module, _, function = look.partition(":")
        check: Callable[[], Answer] = getattr(importlib.import_module(module), function)
        return check()
    except ModuleNotFoundError as error:
        return bad(f"the package {error.name!r} is not installed", f"pip install {error.name}")
    except ImportError as error:
        return bad(f"a package can't be loaded: {error}", "install it again, and what it names")
    except EpfuseError as error:
        return bad(str(error), "see the message")
    except Exception as error:
        return bad(f"the check failed: {type(error).__name__}: {error}", REPORT)


def one_line(text: str) -> str:
    """``text`` without line ends, and cut: errors of compilers and drivers have no end."""
    words = " ".join(text.split()) or "nothing"
    return words if len(words) <= LONGEST_LINE else f"{words[: LONGEST_LINE - 1]}…"
