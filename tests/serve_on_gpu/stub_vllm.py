"""Stands for ``python -m vllm.entrypoints.cli.main``: a server that a hash answers, and a throughput out of the air.

STUB_FAULTS has faults of `tests.serving.stub_server` and of `serve`, STUB_OURS more with epfuse and STUB_OTHERS
without; STUB_LATE seconds until epfuse compiles again.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

OURS = "epfuse" in os.environ["VLLM_PLUGINS"].split(",")


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def compiled(kernel: str, when: float, hit: bool) -> None:
    line = {"time": when, "kernel": kernel, "ours": kernel.startswith("epfuse"), "hit": hit, "us": 5}
    with (Path(os.environ["SERVE_ON_GPU_COMPILES"]) / f"compiles-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def say_plugin() -> None:
    if OURS:
        print("INFO epfuse runs experts in place of vLLM's MarlinExperts; measured on NVIDIA H200: faster", flush=True)


def serve(port: str, model: str) -> None:
    """The stub of tests/serving, with vLLM's routes of its development mode and its metrics.

    Faults: ``dies``; ``calm`` preempts nothing; ``refuses`` weights in place; ``forgets`` them then; ``drifts``;
    ``traceless``; ``leaks`` memory of the GPU; ``secretive`` says nothing of it; ``falls-silent`` says it for 20
    requests.
    """
    more = os.environ.get("STUB_OURS" if OURS else "STUB_OTHERS", "")
    faults = [*os.environ.get("STUB_FAULTS", "").split(), *more.split()]
    if "dies" in faults:
        sys.exit("ValueError: no such model")
    settings = json.loads(option("--profiler-config")) if "--profiler-config" in sys.argv else {}
    traces = Path(settings.get("torch_profiler_dir", ""))
    sys.argv = ["stub_server", port, model, *faults]
    stub = importlib.import_module("tests.serving.stub_server")

    class Handler(stub.Handler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                counts = [] if "calm" in faults else ['vllm:num_preemptions_total{engine="0"} 3.0']
                waited = [f"vllm:request_queue_time_seconds_sum {2.0 * stub.asked}",
                          f"vllm:request_queue_time_seconds_count {stub.asked}"]  # fmt: skip
                data = "\n".join(["# TYPE", *counts, *waited, ""]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            else:
                super().do_GET()

        def do_POST(self) -> None:
            if self.path.startswith("/v1"):
                super().do_POST()
                return
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/collective_rpc" and "refuses" in faults:
                print("ERROR epfuse.errors.ConfigError: the weights of layer 1 were replaced", flush=True)
                self.answer(500, {"error": "EngineCore"})
                return
            if self.path == "/start_profile" and "traceless" not in faults:
                traces.mkdir(parents=True, exist_ok=True)
                (traces / "rank0.pt.trace.json.gz").touch()
            if self.path == "/collective_rpc" and "forgets" in faults:
                stub.FAULTS["shifted"] = "0.5"
            self.answer(200, {})

        def complete(self, body: dict) -> None:
            if "drifts" in faults and stub.asked > 40:
                stub.FAULTS["shifted"] = "0.5"
            super().complete(body)

        def answer(self, status: int, content: dict) -> None:
            if "choices" in content:
                content = content | {"usage": {"completion_tokens": len(content["choices"][0]["text"])}}
            super().answer(status, content)

    if "SERVE_ON_GPU_MEMORY" in os.environ and "secretive" not in faults:
        threading.Thread(target=say_memory, args=(stub, faults), daemon=True).start()
    stub.Server(("127.0.0.1", int(port)), Handler).serve_forever()


def say_memory(stub: ModuleType, faults: list[str]) -> None:
    """What the tool's plugin writes of each process that uses a GPU, of which there are two."""
    while "falls-silent" not in faults or stub.asked < 20:
        allocated = 100.0 + (2.0 * stub.asked if "leaks" in faults else 0.0)
        line = {"time": time.time(), "allocated": allocated, "most_allocated": 500.0, "reserved": 600.0 + stub.asked}
        for process in (1, 2):
            with (Path(os.environ["SERVE_ON_GPU_COMPILES"]) / f"memory-{process}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        time.sleep(0.1)


def main() -> None:
    cache = Path(os.environ["HOME"]) / ".triton" / "cache" / "x"
    filled = cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "kernel.cubin").touch()
    compiled("epfuse_gemm" if OURS else "marlin_gemm", time.time(), filled)
    say_plugin()
    if "serve" in sys.argv:
        if OURS and "STUB_LATE" in os.environ:
            compiled("epfuse_late", time.time() + float(os.environ["STUB_LATE"]), False)
        serve(option("--port"), option("serve"))
    else:
        speed = (120_000.0 if filled else 60_000.0) if OURS else 80_000.0
        found = {"tokens_per_second": speed, "elapsed_time": 2.0, "total_num_tokens": 2 * speed}
        Path(option("--output-json")).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
