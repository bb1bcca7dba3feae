"""llvm-mca: which one is taken, what it is given, what is read from its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from epfuse.aot import mca
from epfuse.target import Target

REPORT = """Iterations:        1
Resources:
[0]   - HWBranch
[1]   - HWLGKM
[2]   - HWVALU
[3]   - HWXDL

Resource pressure per iteration:
[0]    [1]    [2]    [3]
 -     14.00  10.00  32.00
"""


def install(folder: Path, cpus: str, code: int = 0) -> str:
    """An llvm-mca that knows ``cpus``, keeps what it reads, and prints REPORT."""
    (folder / "report").write_text(REPORT)
    tool = folder / "llvm-mca"
    tool.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-mcpu=help*) echo "  {cpus} - Select it."; exit 0;; esac\n'
        f"cat > {folder}/read; cat {folder}/report; exit {code}\n"
    )
    tool.chmod(0o755)
    return str(tool)


def test_an_old_one_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(mca, "NAMES", ("llvm-mca",))
    install(tmp_path, "gfx90a")
    assert mca.find() is None
    tool = install(tmp_path, "gfx942")
    assert mca.find() == tool


def test_clocks_by_unit(tmp_path: Path) -> None:
    body = [
        ".LBB0_2:",
        "\tbuffer_load_dwordx4 v[54:57], v6, s[24:27], 0 offen offset:16",
        "\tv_add_u32_e32 v1, v1, v2 ; a comment",
        "\ts_cbranch_scc1 .LBB0_2",
    ]
    clocks = mca.clocks_of(install(tmp_path, "gfx942"), Target.GFX942, body)
    assert clocks == {"lds_scalar_memory": 56.0, "vector": 40.0, "matrix": 128.0}
    assert (tmp_path / "read").read_text().splitlines() == [
        "\tglobal_load_dwordx4 v[54:57], v6, s[24:25]",
        "\tv_add_u32_e32 v1, v1, v2 ; a comment",
    ]


def test_a_crash_leaves_the_column_empty(tmp_path: Path) -> None:
    assert mca.clocks_of(install(tmp_path, "gfx942", code=134), Target.GFX942, ["\ts_nop 0"]) is None
