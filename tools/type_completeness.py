"""Whether every public name of the package has a known type: ``python tools/type_completeness.py``.

`py.typed` promises it to whoever checks types against epfuse, and mypy doesn't look: it takes what another checker
would infer otherwise. basedpyright does, and brings its own node. Left out, by their names in pyproject.toml's settings
for mypy: modules of @triton.jit functions (`ignore_errors`), and base classes of modules that subclass what is not
installed here (`disallow_subclassing_any`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
BASE_UNKNOWN = {"Type of base class unknown", "Type of metaclass unknown"}


def verify() -> dict[str, Any]:
    """What basedpyright found, with the packages of this interpreter."""
    bin_folder = os.path.dirname(sys.executable)  # not --pythonpath: --verifytypes doesn't heed it
    done = subprocess.run(
        ["basedpyright", "--verifytypes", "epfuse", "--ignoreexternal", "--outputjson"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        timeout=SECONDS,
    )
    if not done.stdout:
        sys.exit(f"basedpyright ended with {done.returncode} and said nothing")
    found: dict[str, Any] = json.loads(done.stdout)
    if "typeCompleteness" not in found:
        sys.exit("\n".join(str(each["message"]) for each in found["generalDiagnostics"]))
    return dict(found["typeCompleteness"])


def modules_with(setting: str, value: bool) -> list[str]:
    """The patterns of module names in pyproject.toml for which mypy has this setting."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    modules = (each["module"] for each in overrides if each.get(setting) is value)
    return [pattern for each in modules for pattern in ([each] if isinstance(each, str) else each)]


def faults(found: dict[str, Any], device_code: list[str], baseless: list[str]) -> list[str]:
    """One line for each public name whose type is not known, or that type checkers may infer differently.

    Args:
        found: what basedpyright says of the package.
        device_code: patterns of modules that are left out.
        baseless: patterns of modules whose base classes may be unknown.
    """
    modules = {each["name"] for each in found["modules"]}
    lines = []
    for symbol in found["symbols"]:
        if not symbol["isExported"] or (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]):
            continue
        module = max((m for m in modules if symbol["name"].startswith(f"{m}.")), key=len)
        if any(fnmatchcase(module, pattern) for pattern in device_code):
            continue
        is_baseless = any(fnmatchcase(module, pattern) for pattern in baseless)
        for each in symbol["diagnostics"]:
            said = each["message"].replace("\N{NO-BREAK SPACE}", " ").split("\n")[0]
            if not (is_baseless and said in BASE_UNKNOWN):
                lines.append(f"{symbol['name']}: {said}")
    return lines


def main() -> None:
    """Print what is not known; exit with 1 if there is any."""
    found = verify()
    lines = faults(found, modules_with("ignore_errors", True), modules_with("disallow_subclassing_any", False))
    count = sum(symbol["isExported"] for symbol in found["symbols"])
    for line in lines:
        print(line)
    print(f"{count} public names in {len(found['modules'])} modules; {len(lines)} times a type isn't known")
    sys.exit(1 if lines or count < len(found["modules"]) else 0)


if __name__ == "__main__":
    main()
