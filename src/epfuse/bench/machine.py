"""The machine that a record is from: device, driver, clocks, versions, commit."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import epfuse
from epfuse.bench.inputs import cache_bytes_of
from epfuse.target import compute_units, target_of
from epfuse.verify import record as verify_record

SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
"""Name in the record -> nvidia-smi's."""

PEER_PACKAGES = ("transformers", "vllm", "deep-gemm", "sgl-deep-gemm", "flashinfer-python")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory, target, compute units and last cache."""
    found = verify_record.describe_device(device)
    if device.type == "cpu":
        found["name"] = _cpu_model() or found["name"]
    return found | {
        "target": target_of(device).value,
        "compute_units": compute_units(device),
        "cache_bytes": cache_bytes_of(device),
    }


def read_clocks(device: torch.device) -> dict[str, Any] | None:
    """Clocks in MHz, driver, power limit and temperature as nvidia-smi gives them now; None without it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # an index would ignore CUDA_VISIBLE_DEVICES
    which = [f"--id=GPU-{uuid}"] if uuid is not None else []
    query = ["nvidia-smi", *which, f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    answer = _run(query)
    if answer is None:
        return None
    return parse_clocks(answer)


def parse_clocks(answer: str) -> dict[str, Any] | None:
    """The first line of nvidia-smi's CSV; a field that it does not know becomes None."""
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer.strip() else []
    if len(values) != len(SMI_FIELDS):
        return None
    found: dict[str, Any] = {}
    for name, value in zip(SMI_FIELDS, values, strict=True):
        try:
            found[name] = value if name == "driver" else float(value)
        except ValueError:  # "[N/A]"
            found[name] = None
    return found


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on, the peers' packages included; None for what is not there."""
    found = verify_record.versions()
    for package in PEER_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any] | None:
    """Hash of the checkout that this package runs from, and whether it has changes; None elsewhere."""
    package = Path(epfuse.__file__).resolve().parent
    root = package.parent.parent
    # site-packages may lie inside somebody else's checkout
    if package.parent.name != "src" or _run(["git", "-C", str(root), "rev-parse", "--show-toplevel"]) != str(root):
        return None
    head = _run(["git", "-C", str(root), "rev-parse", "HEAD"])
    changes = _run(["git", "-C", str(root), "status", "--porcelain"])
    return {"hash": head, "changed": bool(changes)} if head else None


def run_facts(program: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a record says of its run: ``program`` as it was called, date, commit, versions, and ``more``."""
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        **more,
    }


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
