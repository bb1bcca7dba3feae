"""What a command does with its results: one output that fails costs no other, and the exit code says it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import click

from epfuse.cli.exits import EXIT_CHECK_FAILED, EXIT_USAGE, give_up_stdout
from epfuse.errors import ConfigError, EpfuseError
from epfuse.report.write import check_output, check_output_folder

STDOUT = "standard output"


class Delivery:
    """The outputs of one run of a command.

    Made before the work: it refuses files that can't be written. After the work every output is written in a block of
    its own; what fails there is said on stderr, the others go on, and the command exits with 2::

        delivery = Delivery({"--html": html})
        record = work()
        with delivery.of(STDOUT):
            show(record)
        with delivery.of("--html"):
            write_atomic(html, page(record))
        delivery.exit(passed=record.ok)

    Args:
        files: option -> the file that it names, None where it was not given.
        folders: the same of folders, which are made when they are written to.

    Raises:
        ConfigError: a file or folder can't be written, or two options name one file.
    """

    def __init__(
        self, files: Mapping[str, Path | None] | None = None, folders: Mapping[str, Path | None] | None = None
    ) -> None:
        self.failed: list[str] = []
        seen: dict[Path, str] = {}
        for option, file in (files or {}).items():
            if file is None:
                continue
            check_output(file, option)
            place = file.resolve()
            if place in seen and not (place.exists() and not place.is_file()):  # /dev/null may take both
                raise ConfigError(f"{seen[place]} and {option} are one file, {str(file)!r}; give each its own")
            seen[place] = option
        for option, folder in (folders or {}).items():
            if folder is not None:
                check_output_folder(folder, option)

    @contextlib.contextmanager
    def of(self, output: str) -> Iterator[None]:
        """Write one output: a failure is told, and kept for the exit code."""
        try:
            yield
            if output == STDOUT:
                sys.stdout.flush()
        except (OSError, EpfuseError) as error:
            self.failed.append(output)
            if output == STDOUT:
                give_up_stdout()
            with contextlib.suppress(OSError):
                click.echo(f"epfuse: {output} could not be written: {error}", err=True)

    def exit(self, passed: bool) -> NoReturn:
        """2 if an output failed, else 1 if a check did, else 0."""
        sys.exit(EXIT_USAGE if self.failed else 0 if passed else EXIT_CHECK_FAILED)
