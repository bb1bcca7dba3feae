"""Set-ups that are broken are explained, with what mends them."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import stat
import sys
import types
from pathlib import Path

import pytest
import torch

from epfuse import bundle as bundles
from epfuse.bundle import KERNELS, Bundle
from epfuse.doctor import call, compiling, gpu, servers, software
from epfuse.doctor.finding import Verdict
from epfuse.environment import VARIABLES, environment
from epfuse.integrations.interfaces import What
from epfuse.integrations.switches import SWITCHES
from epfuse.integrations.vllm import plugin, releases
from epfuse.target import REFERENCE_DEVICE, Target
from tests.integrations.vllm.fake import use_of, write_package

NEWEST = releases.TESTED[-1]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """No variable of this machine's, and nothing read before."""
    for name in [*VARIABLES, *SWITCHES, "VLLM_PLUGINS", "SGLANG_PLUGINS", *gpu.VISIBLE]:
        monkeypatch.delenv(name, raising=False)
    environment.cache_clear()
    bundles.bundle.cache_clear()
    yield
    environment.cache_clear()
    bundles.bundle.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_no_gpu(no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, found, fix = gpu.driver(tmp_path)
    assert verdict is Verdict.WARNING
    assert "/dev/nvidiactl" in found
    assert fix is not None
    assert "--gpus all" in fix
    monkeypatch.setattr(gpu, "vendor", lambda: None)
    verdict, found, fix = gpu.gpu()
    assert (verdict, found) == (Verdict.WARNING, "none; calls run on the CPU")
    assert fix is not None
    assert "H200" in fix


def test_a_gpu_that_torch_was_not_built_for(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "vendor", lambda: gpu.Vendor.NVIDIA)
    monkeypatch.setattr(torch.version, "cuda", None)
    verdict, found, fix = gpu.gpu()
    assert (verdict, found) == (Verdict.BAD, "an NVIDIA GPU is there, and this torch was not built for it")
    assert fix is not None
    assert "CUDA" in fix


def test_a_driver_that_is_too_old(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(gpu, "vendor", lambda: gpu.Vendor.NVIDIA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    verdict, found, fix = gpu.gpu()
    assert verdict is Verdict.BAD
    assert "too old (found version 11040)" in found
    assert fix is not None
    assert "update the driver" in fix


def test_a_gpu_that_is_hidden(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "vendor", lambda: gpu.Vendor.NVIDIA)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    verdict, found, _ = gpu.gpu()
    assert (verdict, found) == (Verdict.WARNING, "an NVIDIA GPU is there and hidden by CUDA_VISIBLE_DEVICES=''")


@pytest.mark.parametrize(
    ("name", "capability", "verdict", "words"),
    [
        ("NVIDIA H200", (9, 0), Verdict.GOOD, "2 x NVIDIA H200 (h200); 100 of 140 GiB free on the first"),
        ("NVIDIA A100", (8, 0), Verdict.BAD, "is sm_80; epfuse has kernels for"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], verdict: Verdict, words: str
) -> None:
    from epfuse import target

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 140 << 30))
    monkeypatch.setattr(torch.version, "hip", None)
    target._forget_devices()
    try:
        found = gpu.gpu()
    finally:
        target._forget_devices()
    assert found[0] is verdict
    assert words in found[1]


def test_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.driver(tmp_path)[0] is Verdict.BAD
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert gpu.driver(tmp_path) == (Verdict.GOOD, "NVIDIA 580.95.05", None)
    (tmp_path / "dev/nvidiactl").rename(tmp_path / "dev/kfd")
    assert gpu.driver(tmp_path) == (Verdict.GOOD, "AMD of the Linux kernel", None)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM that looks like the newest tested release, with a plugin that is installed."""
    package = tmp_path / "vllm"
    write_package(package, NEWEST)
    monkeypatch.setattr(releases, "package", lambda: package)
    monkeypatch.setattr(releases, "installed", lambda: NEWEST)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **named: [object()])
    return package


def test_the_tested_vllm(vllm: Path) -> None:
    assert servers.vllm() == (Verdict.GOOD, f"vLLM {NEWEST}: the plugin is going to register", None)


def test_a_wrong_vllm(vllm: Path) -> None:
    use = use_of("FusedMoEExpertsModular.apply", What.PARAMETERS)
    write_package(vllm, NEWEST, {use: ("self", "everything")})
    verdict, found, fix = servers.vllm()
    assert verdict is Verdict.BAD
    assert "the plugin stands down" in found
    assert "parameters of FusedMoEExpertsModular.apply" in found
    assert "adds everything" in found
    assert fix == f"pip install 'vllm=={NEWEST}', or EPFUSE_VLLM_FORCE=1 to use it all the same, untested"


@pytest.mark.parametrize(
    ("name", "value", "verdict", "words"),
    [
        ("EPFUSE_DISABLE", "1", Verdict.WARNING, "stands down: EPFUSE_DISABLE=1"),
        ("VLLM_PLUGINS", "others", Verdict.WARNING, "VLLM_PLUGINS=others does not name epfuse"),
        ("VLLM_PLUGINS", "", Verdict.WARNING, "does not name epfuse"),
        ("VLLM_PLUGINS", "others,epfuse", Verdict.GOOD, "is going to register"),
    ],
)
def test_switches(
    vllm: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, verdict: Verdict, words: str
) -> None:
    monkeypatch.setenv(name, value)
    assert servers.vllm()[0] is verdict
    assert words in servers.vllm()[1]


def test_a_plugin_that_is_not_installed(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **named: [])
    verdict, found, _ = servers.vllm()
    assert verdict is Verdict.BAD
    assert "epfuse has no entry point here" in found


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("switch", [None, "EPFUSE_DISABLE", "EPFUSE_VLLM_FORCE"])
def test_the_plugin_itself_decides_the_same(
    vllm: Path, monkeypatch: pytest.MonkeyPatch, changed: bool, switch: str | None
) -> None:
    if changed:
        write_package(vllm, NEWEST, {use_of("FusedMoEExpertsModular.apply", What.PARAMETERS): ("self",)})
    if switch is not None:
        monkeypatch.setenv(switch, "1")
    registered: list[bool] = []
    layer = types.SimpleNamespace(register_layer=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "epfuse.integrations.vllm.stand_in", layer)
    monkeypatch.setattr(plugin, "log", logging.getLogger("nobody listens"))
    plugin._register_once.cache_clear()
    try:
        plugin.register()
    finally:
        plugin._register_once.cache_clear()
    assert ("stands down" in servers.vllm()[1]) is not bool(registered)


def test_sglang_names_plugins_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epfuse.integrations.sglang import releases as sglang

    monkeypatch.setattr(sglang, "package", lambda: None)
    assert servers.sglang() == (Verdict.GOOD, "not installed", None)
    monkeypatch.setattr(sglang, "package", lambda: tmp_path)
    monkeypatch.setattr(sglang, "installed", lambda: "9.9")
    for value, excluded in (("", False), ("a, epfuse", False), ("a", True)):
        monkeypatch.setenv("SGLANG_PLUGINS", value)
        verdict, found, fix = servers.sglang()
        assert verdict is Verdict.BAD  # an empty folder is no release
        assert ("does not name epfuse" in found) is excluded
        assert fix is not None
        assert "FORCE" not in fix


@pytest.mark.parametrize(("machine", "verdict"), [(None, Verdict.WARNING), (gpu.Vendor.AMD, Verdict.BAD)])
def test_a_cache_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: gpu.Vendor | None, verdict: Verdict
) -> None:
    from epfuse import kernel_cache

    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):  # root may write everywhere
        folder = tmp_path / "file" / "kernels"
        folder.parent.touch()
    monkeypatch.setattr(kernel_cache, "_AT_START", str(folder))
    monkeypatch.setattr(compiling, "vendor", lambda: machine)
    found = compiling.cache()
    assert found[0] is verdict
    assert f"{folder} can't be written" in found[1]
    assert found[2] is not None
    assert "TRITON_CACHE_DIR" in found[2]
    monkeypatch.setattr(kernel_cache, "_AT_START", str(tmp_path / "new"))
    assert compiling.cache()[0] is Verdict.GOOD


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "with Python's headers"),
        ("echo 'x.c:1:10: fatal error: Python.h: No such file' >&2; exit 1", "but not Python's headers"),
        ("echo 'cc: error: no such option' >&2; exit 1", "does not compile: no such option"),
        (None, "can't be run"),
    ],
)
def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, words: str) -> None:
    named = tmp_path / "compiler"
    if script is not None:
        named.write_text(f"#!/bin/sh\n{script}\n")
        named.chmod(0o755)
    monkeypatch.setenv("CC", str(named))
    assert words in compiling.compiler()[1]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiling, "vendor", lambda: gpu.Vendor.AMD)
    verdict, found, fix = compiling.compiler()
    assert (verdict, found) == (Verdict.BAD, "none")
    assert fix is not None
    assert "epfuse warmup" in fix


def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    assert compiling.kernel_bundle()[0] is Verdict.GOOD
    kernel = tmp_path / KERNELS / "KEY" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    Bundle.write(tmp_path, "sm_90", "NVIDIA H200", ["bf16"], 8192)
    monkeypatch.setenv("EPFUSE_KERNELS", str(tmp_path))
    environment.cache_clear()
    verdict, found, _ = compiling.kernel_bundle()
    assert verdict is Verdict.GOOD
    assert found == "1 files for NVIDIA H200 (sm_90), 1 layers, up to 8192 tokens, 0 days old"
    kernel.write_bytes(b"other")
    assert "missing or not what they were" in compiling.kernel_bundle()[1]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(re.sub(r'"triton": "[^"]*"', '"triton": "0.1"', manifest.read_text()))
    verdict, found, fix = compiling.kernel_bundle()
    assert verdict is Verdict.BAD
    assert "compiled with triton 0.1" in found
    assert fix is not None
    assert "epfuse warmup" in fix


def test_tables() -> None:
    assert gpu.tables_for(Target.CPU, "CPU")[0] is Verdict.GOOD
    verdict, found, _ = gpu.tables_for(Target.SM90, REFERENCE_DEVICE[Target.SM90])
    assert verdict is Verdict.GOOD
    assert re.search(r"\d+ layers measured on NVIDIA H100 80GB HBM3 \(.*bf16.*\), the newest 20\d\d-", found)
    verdict, found, fix = gpu.tables_for(Target.SM90, "NVIDIA H20")
    assert verdict is Verdict.WARNING
    assert "NVIDIA H200 take their tiles" in found
    assert "epfuse tune" in str(fix)


@pytest.mark.parametrize(("machine", "verdict"), [(None, Verdict.WARNING), (gpu.Vendor.NVIDIA, Verdict.BAD)])
def test_no_triton(monkeypatch: pytest.MonkeyPatch, machine: gpu.Vendor | None, verdict: Verdict) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # to import it fails
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(software, "vendor", lambda: machine)
    assert software.triton()[0] is verdict
    assert compiling.ptxas() == compiling.cache() == (Verdict.GOOD, "none, as there is no triton", None)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPFUSE_")]:
        monkeypatch.delenv(name)
    assert software.environment_variables()[1] == "no EPFUSE_ variable is set"
    monkeypatch.setenv("EPFUSE_KERNEL", "x")
    assert software.environment_variables() == (
        Verdict.WARNING,
        "epfuse has no variable EPFUSE_KERNEL",
        "did you mean EPFUSE_KERNELS?",
    )
    monkeypatch.setenv("EPFUSE_STRICT", "yes")
    verdict, found, _ = software.environment_variables()
    assert verdict is Verdict.BAD
    assert "EPFUSE_STRICT='yes'" in found


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.numbers("2.13.0+cpu") == (2, 13, 0)
    assert software.numbers("unknown") == ()
    assert software.torch()[0] is Verdict.GOOD
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert software.torch()[0] is Verdict.BAD
    monkeypatch.setattr(software, "version_of", lambda name: "4.57.0")
    monkeypatch.setattr(software, "package_of", lambda name: None)
    assert software.transformers()[0] is Verdict.GOOD
    monkeypatch.setattr(software, "package_of", lambda name: Path())
    assert software.transformers()[0] is Verdict.WARNING


def test_a_call_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    verdict, found, _ = call.call()
    assert verdict is Verdict.GOOD
    assert "on the CPU's family, as there is no GPU" in found
    import epfuse

    right = epfuse.fused_experts

    def wrong(*arguments: torch.Tensor, out: torch.Tensor, **named: object) -> torch.Tensor:
        right(*arguments, out=out, **named)
        out[int(out.any(dim=1).nonzero()[0]), :8] = 0
        return out

    monkeypatch.setattr(epfuse, "fused_experts", wrong)
    verdict, found, fix = call.call()
    assert verdict is Verdict.BAD
    assert "wrong results" in found
    assert fix is not None
