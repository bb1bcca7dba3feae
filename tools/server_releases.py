"""Unpack the releases of the servers that the integrations are tested with, without what needs a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epfuse.children import Children
from epfuse.integrations.interfaces import ServerProject


@dataclass(frozen=True)
class Source:
    """Where a server's code comes from.

    Attributes:
        server: what epfuse uses of it.
        package: of its releases, and the directory of its modules.
        tested: the releases.
        packages: a file of what importing its layers needs besides torch, without what that would bring in turn.
        is_wanted: whether a file of the wheel is unpacked.
    """

    server: ServerProject
    package: str
    tested: tuple[str, ...]
    packages: Path
    is_wanted: Callable[[str], bool]

    def bring(self, root: Path, record: bool) -> None:
        """Bring ``root`` up to date; what is there already is kept.

        Args:
            root: directory of ``release-X`` and ``packages``.
            record: also write what epfuse uses of each release, for one that joins the tested ones.
        """
        root.mkdir(parents=True, exist_ok=True)
        self._install_packages(root)
        for release in self.tested:
            self._unpack(release, root)
        if record:
            found = {}
            for release in self.tested:
                tree = root / f"release-{release}" / self.package
                uses = {use: " ".join(parts) for use, parts in self.server.read(tree).items()}
                found[release] = {"digest": self.server.digest(tree), "uses": uses}
            self.server.record.write_text(f"{json.dumps(found, indent=1)}\n")

    def _unpack(self, release: str, root: Path) -> None:
        """One release's code, moved into place when it is whole."""
        tree = root / f"release-{release}"
        if tree.exists():
            return
        print(f"downloading {self.server.name} {release} to {tree}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            _pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, f"{self.package}=={release}")
            (wheel,) = Path(scratch).glob("*.whl")
            half = Path(scratch) / "tree"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(half, [name for name in archive.namelist() if self.is_wanted(name)])
            half.rename(tree)

    def _install_packages(self, root: Path) -> None:
        """Into a directory of their own, so that the tests' environment stays as it is."""
        done, wanted = root / "packages" / self.packages.name, self.packages.read_text()
        if done.exists() and done.read_text() == wanted:
            return
        shutil.rmtree(root / "packages", ignore_errors=True)
        _pip("install", "--no-deps", "--target", str(root / "packages"), "--requirement", str(self.packages))
        done.write_text(wanted)


def _pip(*arguments: str) -> None:
    """Run this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    with Children() as children:
        subprocess.run(command, check=True, process_group=children.id)
