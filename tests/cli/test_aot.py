"""``epfuse aot``: it compiles for real, on a small part; what it prints, and how it exits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.aot import run as aot_run
from epfuse.aot.gates import check
from epfuse.aot.record import AotRecord, TargetRecord
from epfuse.cli.main import main
from epfuse.target import Target
from tests.aot.kernels import amd_gemm

DECODE = ["--stage", "gate_up", "--path", "bf16,w8a8", "--shape", "minimax-m3", "--dtype", "bf16", "--workers", "2"]


def test_compiles_for_gfx942(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["aot", "--target", "gfx942", *DECODE, "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["ok"] is True
    (target,) = record["targets"]
    assert target["target"] == "gfx942"
    assert all(gate["ok"] for gate in target["gates"])
    assert {kernel["path"] for kernel in target["kernels"]} == {"bf16", "w8a8"}
    for kernel in target["kernels"]:
        assert kernel["vgpr_spills"] == kernel["scratch_bytes"] == 0
        kinds = kernel["loop"]["matrix"]
        assert kinds
        assert all(("fp8_fp8" if kernel["path"] == "w8a8" else "bf16") in kind for kind in kinds)
    (seed,) = target["compared"]
    ours = next(kernel for kernel in target["kernels"] if kernel["path"] == "bf16" and kernel["tokens"][0] == 1)
    assert (seed["lds_bytes"], seed["workgroups_per_cu"]) == (36864, 1)
    assert ours["workgroups_per_cu"] >= 2
    predicted = {entry["path"]: entry["predicted_ms"] for entry in record["model"]["predictions"]}
    assert predicted["w8a8"]["8k/c256"] < predicted["bf16"]["8k/c256"]

    # LLVM's own idea of the occupancy, which knows the registers and not the LDS that a launch asks for
    from epfuse.aot.amdgcn import register_waves, resources_of

    for file in tmp_path.iterdir():
        assembly = file.read_text()
        waves = re.search(r"^; Occupancy: (\d+)$", assembly, re.MULTILINE)
        assert waves is not None
        assert register_waves(resources_of(assembly, lds_bytes=0, waves=4)) == int(waves[1])


def test_compiles_for_sm_90() -> None:
    part = ["--stage", "down", "--path", "bf16", "--shape", "minimax-m3", "--dtype", "bf16", "--workers", "2"]
    result = CliRunner().invoke(main, ["aot", "--target", "sm_90", *part, "--json"])
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    for kernel in target["kernels"]:
        assert kernel["registers"] <= 255
        assert any("HGMMA" in kind for kind in kernel["loop"]["matrix"])


def record_of(**kernel: int) -> AotRecord:
    kernels = [amd_gemm(**kernel)]
    return AotRecord([TargetRecord(Target.GFX942, kernels, [], check(Target.GFX942, kernels))], [])


@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_a_failed_gate_exits_with_1(monkeypatch: pytest.MonkeyPatch, form: list[str]) -> None:
    monkeypatch.setattr(aot_run, "run", lambda request, progress: record_of(vgpr_spills=7))
    result = CliRunner().invoke(main, ["aot", *form])
    assert result.exit_code == 1
    assert "FAIL gfx942, no spills: gate_up bf16 16x64x128 4w 2s: 7 VGPRs and 0 SGPRs spilled" in result.stderr


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_run, "run", lambda request, progress: record_of())
    result = CliRunner().invoke(main, ["aot"])
    assert result.exit_code == 0
    assert "16x64x128 4w 2s" in result.stdout
    assert "74+0" in result.stdout
    markdown = CliRunner().invoke(main, ["aot", "--markdown"]).stdout
    assert "| gate_up | bf16 | 16x64x128 4w 2s |" in markdown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "gfx90a"], "'gfx90a' is not one of sm_90, gfx942, gfx950"),
        (["--stage", "gate"], "'gate' is not one of route"),
        (["--json", "--markdown"], "exclude each other"),
        (["--workers", "0"], "0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["aot", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
