"""Unpack the vLLM releases that the integration is tested with: ``python tools/vllm_releases.py DIRECTORY``.

With ``--record`` what epfuse uses of each is written to ``interfaces.json``, for a release that joins the tested ones.
Only their Python code and metadata, as they are in the wheels; the compiled operators are not needed without a GPU.
What is there already is kept.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from epfuse.children import Children
from epfuse.integrations.vllm.interfaces import RECORD, read_interfaces
from epfuse.integrations.vllm.releases import TESTED

PACKAGES = Path(__file__).with_name("vllm_releases.txt")
"""What importing vLLM's layers needs besides torch, without what that would bring in turn."""


def pip(*arguments: str) -> None:
    """Run this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    with Children() as children:
        subprocess.run(command, check=True, process_group=children.id)


def unpack(release: str, root: Path) -> None:
    """One release's code, moved into place when it is whole."""
    tree = root / f"release-{release}"
    if tree.exists():
        return
    print(f"downloading vLLM {release} to {tree}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, f"vllm=={release}")
        (wheel,) = Path(scratch).glob("*.whl")
        half = Path(scratch) / "tree"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(half, [name for name in archive.namelist() if _is_wanted(name)])
        half.rename(tree)


def _is_wanted(name: str) -> bool:
    return name.endswith((".py", ".json")) or ".dist-info/" in name


def install_packages(root: Path) -> None:
    """Into a directory of their own, so that the tests' environment stays as it is."""
    done, wanted = root / "packages" / PACKAGES.name, PACKAGES.read_text()
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(root / "packages", ignore_errors=True)
    pip("install", "--no-deps", "--target", str(root / "packages"), "--requirement", str(PACKAGES))
    done.write_text(wanted)


def record_interfaces(root: Path) -> None:
    """What the plugin compares a vLLM with."""
    found = {}
    for release in TESTED:
        interfaces = read_interfaces(root / f"release-{release}" / "vllm")
        found[release] = {use: " ".join(parts) for use, parts in interfaces.items()}
    RECORD.write_text(f"{json.dumps(found, indent=1)}\n")


def main() -> None:
    """Bring the directory up to date."""
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    install_packages(root)
    for release in TESTED:
        unpack(release, root)
    if "--record" in sys.argv:
        record_interfaces(root)


if __name__ == "__main__":
    main()
