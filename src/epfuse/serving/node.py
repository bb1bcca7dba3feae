"""What a node says of itself: free GPUs, samples of clocks, power and memory, and the versions of what runs there."""

from __future__ import annotations

import csv
import json
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

QUERY_PATIENCE = 20.0
"""Seconds that a vendor's tool may take."""
BUSY_MIB = 2048.0
"""Memory in use on a GPU that nobody uses stays below; drivers and displays take some hundred MiB."""


@dataclass(frozen=True)
class GpuSample:
    """One GPU at one moment; None where the vendor's tool does not say.

    Attributes:
        gpu: index.
        clock: of the compute units, MHz.
        memory_clock: MHz.
        power: W.
        memory: in use, MiB.
        temperature: degrees Celsius.
        busy: share of time with work, percent.
    """

    gpu: int
    clock: float | None = None
    memory_clock: float | None = None
    power: float | None = None
    memory: float | None = None
    temperature: float | None = None
    busy: float | None = None


NVIDIA = ("nvidia-smi", "--format=csv,noheader,nounits",
          "--query-gpu=index,clocks.sm,clocks.mem,power.draw,memory.used,temperature.gpu,utilization.gpu")  # fmt: skip
ROCM = ("rocm-smi", "--json", "--showclocks", "--showpower", "--showmeminfo", "vram", "--showtemp", "--showuse")
AMD = ("amd-smi", "metric", "--json")


def _from_nvidia(text: str) -> list[GpuSample]:
    return [GpuSample(int(row[0]), *map(_number, row[1:7])) for row in csv.reader(text.splitlines()) if len(row) >= 7]


def _from_rocm(text: str) -> list[GpuSample]:
    """rocm-smi's keys carry units and differ a little between releases: they are found by their words."""
    found = []
    for card, values in json.loads(text).items():
        if not re.fullmatch(r"card\d+", card):
            continue

        def of(*words: str, values: Mapping[str, Any] = values) -> float | None:
            key = next((key for key in values if all(word in key.lower() for word in words)), None)
            return None if key is None else _number(str(values[key]))

        used = of("vram", "used memory")
        found.append(
            GpuSample(
                int(card[4:]),
                clock=of("sclk", "clock speed"),
                memory_clock=of("mclk", "clock speed"),
                power=of("power (w)"),
                memory=None if used is None else used / (1 << 20),
                temperature=of("temperature", "junction"),
                busy=of("gpu use"),
            )
        )
    return found


def _from_amd(text: str) -> list[GpuSample]:
    content = json.loads(text)
    found = []
    for entry in content["gpu_data"] if isinstance(content, dict) else content:

        def of(*keys: str, entry: Any = entry) -> float | None:
            at = entry
            for key in (*keys, "value"):
                at = at.get(key) if isinstance(at, dict) else at
            return _number(str(at))

        found.append(
            GpuSample(
                int(entry["gpu"]),
                clock=of("clock", "gfx_0", "clk"),
                memory_clock=of("clock", "mem_0", "clk"),
                power=of("power", "socket_power"),
                memory=of("mem_usage", "used_vram"),
                temperature=of("temperature", "hotspot"),
                busy=of("usage", "gfx_activity"),
            )
        )
    return found


Reader = Callable[[str], list[GpuSample]]
TOOLS: dict[str, list[tuple[tuple[str, ...], Reader]]] = {
    "nvidia": [(NVIDIA, _from_nvidia)],
    "amd": [(AMD, _from_amd), (ROCM, _from_rocm)],
    "none": [],
}


class Gpus:
    """The GPUs of this node as its vendor's tool shows them.

    Args:
        vendor: ``amd``, ``nvidia`` or ``none``.

    Attributes:
        absent: why nothing can be known; empty where a tool answers.
    """

    def __init__(self, vendor: str) -> None:
        self.absent = "" if TOOLS[vendor] else "the point uses no GPU"
        self._tool: tuple[tuple[str, ...], Reader] | None = None
        for command, reader in TOOLS[vendor]:
            if shutil.which(command[0]) is None:
                self.absent = f"{command[0]} is not installed"
                continue
            try:
                _query(command, reader)
            except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, AttributeError) as error:
                self.absent = f"{command[0]} gives nothing that can be read: {error!r:.200}"
                continue
            self._tool, self.absent = (command, reader), ""
            break

    def sample(self) -> list[GpuSample]:
        """One sample of each; none where no tool answers."""
        if self._tool is None:
            return []
        try:
            return _query(*self._tool)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, AttributeError):
            return []

    def busy(self) -> list[int]:
        """Those whose memory is in use."""
        return [sample.gpu for sample in self.sample() if sample.memory is not None and sample.memory > BUSY_MIB]


class Sampler:
    """Samples all GPUs to a CSV file, a line a sample and GPU, for as long as the ``with`` block runs."""

    def __init__(self, gpus: Gpus, path: Path, interval: float) -> None:
        self._gpus, self._path, self._interval = gpus, path, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        if not self._gpus.absent:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with self._path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["time", *(field.name for field in fields(GpuSample))])
            next_time = time.monotonic()
            while True:
                now = time.time()
                lines.writerows([f"{now:.3f}", *astuple(sample)] for sample in self._gpus.sample())
                file.flush()
                next_time = max(next_time + self._interval, time.monotonic())
                if self._end.wait(next_time - time.monotonic()):
                    return


def facts(gpus: Gpus) -> dict[str, Any]:
    """Of the node, JSON-ready."""
    return {
        "node": socket.gethostname(),
        "kernel": platform.release(),
        "cpus": _cpus(),
        "gpu_samples": gpus.absent or "a line a second in gpu.csv",
        "gpus": [vars(sample) for sample in gpus.sample()],
    }


def answer(argv: tuple[str, ...], environment: Mapping[str, str], patience: float = 120.0) -> str:
    """What a command prints; what went wrong, in brackets, where it prints nothing."""
    try:
        done = subprocess.run(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, timeout=patience, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"({error})"[:300]
    text = done.stdout.decode(errors="replace").strip()
    return text or f"(exit code {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]})"


def _query(command: tuple[str, ...], reader: Reader) -> list[GpuSample]:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=QUERY_PATIENCE, check=True, text=True
    )
    return reader(done.stdout)


def _number(text: str) -> float | None:
    found = re.search(r"-?\d+(\.\d+)?", text)
    return None if found is None else float(found[0])


def _cpus() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()
