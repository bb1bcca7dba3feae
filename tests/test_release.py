"""What `make release` refuses; it builds and tries the archives itself."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import click
import pytest
from tools.release import check_changelog, check_sdist, check_wheel

import epfuse

ROOT = Path(__file__).parents[1]
FILES = {"src/epfuse/__init__.py", "src/epfuse/py.typed", "README.md"}
INFO = "epfuse-1.2.0.dist-info"
METADATA = "Metadata-Version: 2.4\nName: epfuse\nVersion: 1.2.0\nLicense-Expression: Apache-2.0\n"
IN_WHEEL = [
    "epfuse/__init__.py",
    "epfuse/py.typed",
    *(f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")),
]


def wheel(folder: Path, names: list[str], metadata: str = METADATA) -> Path:
    path = folder / "epfuse-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, metadata if name.endswith("METADATA") else "")
    return path


def sdist(folder: Path, names: set[str]) -> Path:
    path = folder / "epfuse-1.2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"epfuse-1.2.0/{name}"), io.BytesIO())
    return path


def test_a_wheel_has_the_package_and_its_metadata(tmp_path: Path) -> None:
    check_wheel(wheel(tmp_path, IN_WHEEL), FILES, "1.2.0")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"lacks \['epfuse/py.typed'\]"):
        check_wheel(wheel(tmp_path, [name for name in IN_WHEEL if "typed" not in name]), FILES, "1.2.0")
    with pytest.raises(click.ClickException, match=r"lacks \['README.md'\]"):
        check_sdist(sdist(tmp_path, FILES - {"README.md"} | {"PKG-INFO"}), FILES)


def test_a_file_too_many_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"has \['tests/notes.py'\] too many"):
        check_wheel(wheel(tmp_path, [*IN_WHEEL, "tests/notes.py"]), FILES, "1.2.0")
    with pytest.raises(click.ClickException, match=r"has \['notes'\] too many"):
        check_sdist(sdist(tmp_path, FILES | {"PKG-INFO", "notes"}), FILES)


@pytest.mark.parametrize(
    ("there", "instead", "words"),
    [
        ("Version: 1.2.0", "Version: 1.3.0", "says that it is epfuse 1.3.0, not epfuse 1.2.0"),
        ("Apache-2.0", "Apache 2", "Apache 2"),
        ("Name: epfuse\n", "", "name"),
    ],
)
def test_wrong_metadata_are_refused(tmp_path: Path, there: str, instead: str, words: str) -> None:
    with pytest.raises(click.ClickException, match=words):
        check_wheel(wheel(tmp_path, IN_WHEEL, METADATA.replace(there, instead)), FILES, "1.2.0")


@pytest.mark.parametrize(
    "text",
    [
        "## [Unreleased]\n",
        "## [Unreleased]\n## [1.1.0] - 2026-01-01\n",
        "## [1.2.0]\n",
        "## [1.2.0] - soon\n",
        "## [1.3.0] - 2026-02-01\n## [1.2.0] - 2026-01-01\n",
    ],
)
def test_the_changelog_must_have_the_version_and_its_day(text: str) -> None:
    with pytest.raises(click.ClickException, match=r"it must be \[1.2.0\] - YYYY-MM-DD"):
        check_changelog(text, "1.2.0")


def test_the_changelog_has_this_version() -> None:
    check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), epfuse.__version__)
