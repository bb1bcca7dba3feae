"""llvm-mca on a main loop: clocks that its instructions keep each unit of a SIMD busy, by LLVM's scheduling model.

LLVM 19, which Debian 12 and 13 package, knows gfx942 and not gfx950. Its model counts in steps of four clocks (a wave
of 64 on 16 lanes) and knows nothing of memory, so only the sums per unit are taken: for one wave, a lower bound.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from epfuse.arguments import checks_enums
from epfuse.target import Target

NAMES = ("llvm-mca", "llvm-mca-20", "llvm-mca-19")
CLOCKS_PER_STEP = 4
UNITS = {"HWVALU": "vector", "HWXDL": "matrix", "HWLGKM": "lds_scalar_memory", "HWVMEM": "memory", "HWSALU": "scalar"}
"""Names of the processor resources in LLVM's ``SISchedule.td``, and ours."""
BUFFER_LOAD = re.compile(r"buffer_load_(\w+) (\S+), (v\d+), s\[(\d+):\d+\].*")
"""LLVM 19's llvm-mca dies of a corrupted heap on these; a global load keeps the same unit busy for as long."""


def find() -> str | None:
    """Path of an llvm-mca that knows gfx942, None where there is none."""
    for name in NAMES:
        path = shutil.which(name)
        if path and _knows(path, "gfx942"):
            return path
    return None


@checks_enums
def clocks_of(mca: str, target: Target, body: list[str]) -> dict[str, float] | None:
    """Clocks that one turn of a loop keeps each unit busy for one wave; None if llvm-mca can't read it."""
    instructions = (line for line in body if re.match(r"^\s+[a-z]", line) and "branch" not in line)
    code = "\n".join(BUFFER_LOAD.sub(_as_global_load, line) for line in instructions)
    done = subprocess.run(
        [mca, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={target.value}", "-iterations=1", "-instruction-info=false"],
        input=code,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return None
    return _pressure(done.stdout)


def _as_global_load(load: re.Match[str]) -> str:
    first = int(load[4])
    return f"global_load_{load[1]} {load[2]}, {load[3]}, s[{first}:{first + 1}]"


def _pressure(report: str) -> dict[str, float]:
    """Clocks by unit from the report's table of resource pressure."""
    units = {match[1]: match[2] for match in re.finditer(r"^(\[\d+\])\s+- (\w+)$", report, re.MULTILINE)}
    table = re.search(r"^Resource pressure per iteration:\n(.*)\n(.*)$", report, re.MULTILINE)
    if table is None:
        return {}
    steps = dict(zip(table[1].split(), table[2].split(), strict=True))
    return {
        UNITS[units[place]]: CLOCKS_PER_STEP * float(value)
        for place, value in steps.items()
        if value != "-" and units.get(place) in UNITS
    }


def _knows(path: str, cpu: str) -> bool:
    command = [path, "-mtriple=amdgcn-amd-amdhsa", "-mcpu=help"]
    try:
        done = subprocess.run(command, input="", capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return cpu in done.stdout + done.stderr
