"""How a command ends: its exit code and one line on stderr, whatever was raised.

| code | meaning |
| --- | --- |
| 0 | good |
| 1 | a check failed: a wrong result, a broken gate, a slower path |
| 2 | wrong usage, or an environment in which the command can't do its work or deliver its result |
| 70 | a bug of epfuse: something was raised that nobody expected; EPFUSE_LOG=debug shows the traceback |
| 75 | `epfuse serve`: points of a run have not ended, nothing is lost, the run can be resumed |
| 130 | interrupted |
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from epfuse import __version__
from epfuse.environment import environment
from epfuse.errors import EpfuseError

EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory")
"""Words of the RuntimeErrors that torch raises where Python has MemoryError."""


class PlainCommand(click.Command):
    """A click command that ends as the table above says."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit; click's own, but for the exit codes and what a foreign error looks like."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)

        def command() -> None:
            name = prog_name or self.name or "epfuse"
            self._main_shell_completion(extra, name, complete_var)
            with self.make_context(name, list(sys.argv[1:] if args is None else args), **extra) as context:
                self.invoke(context)

        sys.exit(exit_code(command))


def exit_code(command: Callable[[], object]) -> int:
    """Run ``command`` to its end, say on stderr what went wrong, and return the exit code (the table above)."""
    try:
        _prepare_streams()
        code = _run(command)
        sys.stdout.flush()  # now, not when the interpreter ends: a full disk is a failure
        return code
    except KeyboardInterrupt:
        return _end("interrupted", EXIT_INTERRUPTED)
    except click.Abort as error:  # click's word for Ctrl-C, and for an end of input
        return _end("interrupted", EXIT_INTERRUPTED) if not isinstance(error.__cause__, EOFError) else _bug(error)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return EXIT_USAGE
    except EpfuseError as error:
        return _end(str(error), EXIT_USAGE)
    except Exception as error:
        words = _environments_fault(error)
        return _bug(error) if words is None else _end(words, EXIT_USAGE)


def _run(command: Callable[[], object]) -> int:
    try:
        command()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else EXIT_USAGE
    return 0


def _environments_fault(error: Exception) -> str | None:
    """What to say of an error that the machine or an input causes; None if it is a bug."""
    if isinstance(error, ImportError):
        what = f"the package {error.name!r}" if error.name else "a package"
        missing = isinstance(error, ModuleNotFoundError)
        return f"this needs {what}, which is not installed" if missing else f"{what} can't be loaded: {error}"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else f"input or output failed: {reason}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "out of memory; smaller sizes or fewer tokens need less"
    if isinstance(error, RecursionError):
        return "an input is nested too deeply"
    if isinstance(error, UnicodeError):
        return f"text can't be read or written: {error}"
    return None


def _bug(error: Exception) -> int:
    """Say that this should not have happened; the traceback is for who asks for it."""
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(place[-1].filename)}:{place[-1].lineno})" if place else ""
    code = _end(
        f"a bug of epfuse {__version__}: {type(error).__name__}: {error}{where}; EPFUSE_LOG=debug shows the traceback",
        EXIT_BUG,
    )
    with contextlib.suppress(EpfuseError):
        environment()  # which switches the log on
    logging.getLogger("epfuse").debug("the traceback of the bug", exc_info=error)
    return code


def _end(message: str, code: int) -> int:
    """One line on stderr; what stdout still holds goes out if it can, and else nowhere."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        give_up_stdout()
    with contextlib.suppress(OSError):
        click.echo(f"epfuse: {message}", err=True)
    return code


def give_up_stdout() -> None:
    """Let what stdout could not write go nowhere: or the interpreter tries again at its end, and says so."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Make stdout and stderr something that takes every text: closed ones lead nowhere, ASCII ones get escapes."""
    for descriptor in range(3):  # or the first file that is opened becomes stdout
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        lossy = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(
            lossy, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True, write_through=True
        )


class _Lossy(io.FileIO):
    """stderr on a full disk, or that nobody reads: what can't be said there costs no result."""

    def write(self, data: Any) -> int:
        """All of it, or nothing."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError:
            return memoryview(data).nbytes
