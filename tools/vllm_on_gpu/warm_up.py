"""Compile what a run will launch, in processes side by side: Triton's cache then has it for everyone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from epfuse.children import Children

ROOT = Path(__file__).resolve().parents[2]


def command_for(tokens: int) -> list[str]:
    """What compiles one token count."""
    return [sys.executable, "-m", "tools.vllm_on_gpu", "--warm-up", str(tokens)]


def warm_up(tokens: Sequence[int], jobs: int, seconds: float) -> list[str]:
    """Run this package with ``--warm-up T`` for every T, ``jobs`` at a time.

    Args:
        tokens: the token counts of the run, each compiles its own tiles.
        jobs: processes at a time; each holds the layer's weights on the GPU, some 6 GB.
        seconds: after this many they are stopped; what they have compiled is kept.

    Returns:
        What went wrong, a line each; the run itself then compiles what is missing.
    """
    end, waiting, trouble = time.monotonic() + seconds, sorted(tokens), list[str]()
    running: dict[int, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder, Children() as children:
        while waiting or running:
            late = time.monotonic() >= end
            while waiting and len(running) < jobs and not late:
                count = waiting.pop()  # the largest first
                with _log(folder, count).open("wb") as log:
                    running[count] = subprocess.Popen(
                        command_for(count), cwd=ROOT, stdout=log, stderr=log, process_group=children.id
                    )
            for count, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    trouble.append(f"compiling for T={count} was stopped after {seconds:.0f} s")
                elif process.returncode:
                    lines = _log(folder, count).read_text(errors="replace").strip().splitlines()
                    trouble.append(f"compiling for T={count} failed: {lines[-1] if lines else process.returncode}")
                del running[count]
            if late:
                trouble += [f"nothing was compiled for T={count} beforehand" for count in waiting]
                waiting = []
            time.sleep(0.05)
    return trouble


def _log(folder: str, tokens: int) -> Path:
    return Path(folder, f"{tokens}.log")
