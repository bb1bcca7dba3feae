"""Stands for ``python -m vllm.entrypoints.cli.main``: a server that a hash answers, and a throughput out of the air.

STUB_FAULTS has faults of `tests.serving.stub_server`; STUB_LATE seconds until epfuse compiles again.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

OURS = "epfuse" in os.environ["VLLM_PLUGINS"].split(",")
SERVER = Path(__file__).parents[1] / "serving" / "stub_server.py"


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def compiled(kernel: str, when: float, hit: bool) -> None:
    line = {"time": when, "kernel": kernel, "ours": kernel.startswith("epfuse"), "hit": hit, "us": 5}
    with (Path(os.environ["SERVE_ON_GPU_COMPILES"]) / f"compiles-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def say_plugin() -> None:
    if OURS:
        print("INFO epfuse runs experts in place of vLLM's MarlinExperts; measured on NVIDIA H200: faster", flush=True)


def main() -> None:
    cache = Path(os.environ["HOME"]) / ".triton" / "cache" / "x"
    filled = cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "kernel.json").write_text("{}")
    compiled("epfuse_gemm" if OURS else "marlin_gemm", time.time(), filled)
    if "serve" in sys.argv:
        model, port = sys.argv[sys.argv.index("serve") + 1], option("--port")
        say_plugin()
        if OURS and "STUB_LATE" in os.environ:
            compiled("epfuse_late", time.time() + float(os.environ["STUB_LATE"]), False)
        sys.argv = [str(SERVER), port, model, *os.environ.get("STUB_FAULTS", "").split()]
        runpy.run_path(str(SERVER), run_name="__main__")
    else:
        say_plugin()
        speed = (120_000.0 if filled else 60_000.0) if OURS else 80_000.0
        found = {"tokens_per_second": speed, "elapsed_time": 2.0, "total_num_tokens": 2 * speed}
        Path(option("--output-json")).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
