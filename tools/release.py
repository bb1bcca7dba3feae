"""Build what a release consists of, and try it as its users get it: ``python -m tools.release DIST`` (RELEASE.md).

The sdist and, from it, the wheel are built from the last commit, twice: the second time in another folder, with another
umask, time zone and hash seed. Both must be the same to the byte. Then each is installed in an environment of its own,
where the demonstration and a part of the tests run against what was installed.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import click
from packaging.metadata import InvalidMetadata, Metadata
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1800
"""The longest that one command may take: an environment with torch, on a slow line."""
EXTRAS = "cpu,demo,profile,serve,test"
SMOKE = (
    "tests/cli/test_main.py",
    "tests/measured",
    "tests/report",
    "tests/test_expert_map.py",
    "tests/test_readme.py",
)
"""Quick ones: the commands, the public names, and what brings files of its own, tables and templates."""
ASKED = "import epfuse, platform, torch; print(epfuse.__file__, platform.python_version(), torch.__version__)"
ELSEWHERE = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1"}


def run(*command: str | Path, folder: Path, umask: int = -1, env: Mapping[str, str] | None = None) -> str:
    """Run a command in a folder and return its stdout.

    Raises:
        click.ClickException: it failed; with the end of what it said.
    """
    words = [str(word) for word in command]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        words, cwd=folder, umask=umask, env=plain | (env or {}), capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout


def committed() -> str:
    """The last commit.

    Raises:
        click.ClickException: there are changes beside it, which a release would not have.
    """
    if changed := run("git", "status", "--porcelain", folder=ROOT):
        raise click.ClickException(f"a release is what is committed; commit these, or put them away:\n{changed}")
    return run("git", "rev-parse", "HEAD", folder=ROOT).strip()


def build(commit: str, folder: Path, umask: int = 0o022, env: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """The sdist and the wheel of a commit, made in ``folder``; their times are the commit's."""
    folder.mkdir(parents=True)
    when = run("git", "show", "--no-patch", "--format=%ct", commit, folder=ROOT).strip()
    run("git", "archive", "-o", folder / "files.tar", commit, folder=ROOT)
    source = folder / "source"
    source.mkdir()
    run("tar", "--no-same-permissions", "-xf", folder / "files.tar", folder=source, umask=umask)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*command, folder=source, umask=umask, env={"SOURCE_DATE_EPOCH": when, **(env or {})})
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_sdist(sdist: Path, files: set[str]) -> None:
    """Refuse an sdist that has not exactly git's files, and its metadata.

    Raises:
        click.ClickException: a file is missing or is one too many.
    """
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    same_names(sdist, found, files | {"PKG-INFO"})


def check_wheel(wheel: Path, files: set[str], version: str) -> None:
    """Refuse a wheel that has not exactly the package's files, or whose metadata are not those of this version.

    Raises:
        click.ClickException: what is wrong.
    """
    info = f"epfuse-{version}.dist-info"
    package = {name.removeprefix("src/") for name in files if name.startswith("src/epfuse/")}
    metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    with zipfile.ZipFile(wheel) as archive:
        same_names(wheel, set(archive.namelist()), package | metadata)
        text = archive.read(f"{info}/METADATA")
    try:
        said = Metadata.from_email(text, validate=True)
    except* InvalidMetadata as faults:
        raise click.ClickException(f"{wheel.name}: {'; '.join(map(str, faults.exceptions))}") from None
    if (said.name, said.version) != ("epfuse", Version(version)):
        raise click.ClickException(f"{wheel.name} says that it is {said.name} {said.version}, not epfuse {version}")


def same_names(archive: Path, found: set[str], wanted: set[str]) -> None:
    """Refuse an archive that has other files than wanted.

    Raises:
        click.ClickException: with the names.
    """
    if found != wanted:
        raise click.ClickException(
            f"{archive.name} lacks {sorted(wanted - found)} and has {sorted(found - wanted)} too many"
        )


def check_changelog(text: str, version: str) -> None:
    """Refuse a changelog whose newest version is not this one, with the day of its release.

    Raises:
        click.ClickException: what it has instead.
    """
    entries = [heading for heading in re.findall(r"^## \[(.+)$", text, flags=re.MULTILINE) if heading != "Unreleased]"]
    newest = entries[0] if entries else "none"
    said, _, day = newest.partition("] - ")
    try:
        datetime.date.fromisoformat(day)
    except ValueError:
        day = ""
    if said != version or not day:
        raise click.ClickException(f"CHANGELOG.md's newest version is [{newest}; it must be [{version}] - YYYY-MM-DD")


def try_out(archive: Path, sources: Path, folder: Path, version: str, python: str, torch: str | None) -> str:
    """Install an archive in an environment of its own, run the demonstration and a part of the tests.

    Args:
        archive: wheel or sdist.
        sources: the unpacked sdist; its tests run, but against what was installed.
        folder: what is made here is removed by the caller.
        version: that must come out.
        python: makes the environment.
        torch: its version; None for the pinned one.

    Returns:
        What ran, in one line.

    Raises:
        click.ClickException: something failed.
    """
    folder.mkdir()
    run(python, "-m", "venv", folder / "venv", folder=folder)
    own = folder / "venv" / "bin" / "python"
    pins = ["-c", sources / "constraints.txt", *(["-c", sources / "constraints-torch.txt"] if torch is None else [])]
    wanted = [f"epfuse[{EXTRAS}] @ {archive.as_uri()}", *([] if torch is None else [f"torch=={torch}"])]
    run(own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, *wanted, folder=folder)
    place, with_python, with_torch = run(own, "-c", ASKED, folder=folder).split()
    command = folder / "venv" / "bin" / "epfuse"
    found = run(command, "--version", folder=folder).split()[-1]
    if found != version or not Path(place).is_relative_to(folder / "venv"):
        raise click.ClickException(f"{archive.name} installs epfuse {found} at {place}")
    run(command, "demo", "--json", folder=folder)
    options = ("-q", "-p", "no:cacheprovider", "-n", "0")
    said = run(own, "-m", "pytest", *options, *SMOKE, folder=sources, env={"OMP_NUM_THREADS": "1"})
    return f"{archive.name}, Python {with_python}, torch {with_torch}: demo good, {said.strip().splitlines()[-1]}"


@click.command()
@click.argument("dist", type=click.Path(file_okay=False, path_type=Path))
@click.option("--torch", metavar="VERSION", help="Try it with this one.  [default: the pinned one]")
@click.option("--python", default=sys.executable, show_default="this one", help="Try it with this interpreter.")
def main(dist: Path, torch: str | None, python: str) -> None:
    """Build the sdist and the wheel of the last commit into DIST, and try both; see RELEASE.md."""
    commit = committed()
    with tempfile.TemporaryDirectory(prefix="epfuse-release-") as name:
        folder = Path(name)
        built = build(commit, folder / "here")
        again = build(commit, folder / "and" / "elsewhere", umask=0o077, env=ELSEWHERE)
        for one, other in zip(built, again, strict=True):
            if digest(one) != digest(other):
                raise click.ClickException(f"{one.name} comes out differently in another folder")
        sdist, wheel = built
        version = wheel.name.split("-")[1]
        files = set(run("git", "ls-tree", "-rz", "--name-only", commit, folder=ROOT).split("\0")) - {""}
        check_sdist(sdist, files)
        check_wheel(wheel, files, version)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        sources = folder / f"epfuse-{version}"
        check_changelog((sources / "CHANGELOG.md").read_text(encoding="utf-8"), version)
        click.echo(f"epfuse {version}, commit {commit}: built twice, the same bytes; names and metadata are right")
        for archive in (wheel, sdist):
            place = folder / archive.suffix.lstrip(".")
            click.echo(try_out(archive, sources, place, version, python, torch))
            shutil.rmtree(place)
        dist.mkdir(parents=True, exist_ok=True)
        for path in (sdist, wheel):
            shutil.copyfile(path, dist / path.name)
            click.echo(f"{digest(path)}  {path.name}")


if __name__ == "__main__":
    main()
