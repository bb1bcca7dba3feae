"""Record the two traces of a small MiniMax-M3 that the tests of `epfuse profile` read.

    PYTHONPATH=src python tools/record_profiles.py OUT_DIR

needs a GPU (CUDA or ROCm), transformers, and a minute. It writes

    h100-epfuse-experts.trace.json.gz        the routed experts run by this package's kernels
    h100-transformers-experts.trace.json.gz  by transformers' eager experts

with the GPU's name in place of h100.

Each is one decode step of 8 requests, in BF16, recorded by torch.profiler with stacks. Of the Python functions only the
modules' forwards are kept, of the operators' events nothing, and the host's name is removed: what is left is small.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from epfuse.demo.model import build_model, seed_weights
from epfuse.demo.settings import ModelSize
from epfuse.demo.text import VOCAB
from epfuse.integrations.transformers import replace_experts
from epfuse.parallel.group import EPGroup
from epfuse.profiling.read_trace import MODULE_PREFIX
from epfuse.report.write import replacing

REQUESTS = 8
PROMPT = 64
WARM_UP = 3
SIZE = ModelSize(hidden=512, intermediate=256, dense_intermediate=512, dense_layers=1, moe_layers=3)

DROPPED_CATEGORIES = {"cpu_op", "ac2g", "fwdbwd", "cuda_sync", "overhead"}
DROPPED_KEYS = {"host_name", "traceName", "trace_id"}


def record(model: torch.nn.Module, device: torch.device, path: Path) -> None:
    """Prefill, then profile one decode step after some that warm up."""
    generator = torch.Generator("cpu").manual_seed(0)
    prompt = torch.randint(VOCAB - 1, (REQUESTS, PROMPT), generator=generator).to(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        raw = Path(folder) / "trace.json"
        state = model(input_ids=prompt, use_cache=True)
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=WARM_UP, active=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(raw)),
            with_stack=True,
        ) as profiler:
            for _ in range(WARM_UP + 1):
                token = state.logits[:, -1:].argmax(dim=-1)
                state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                profiler.step()
        with raw.open() as file:
            trace = json.load(file)
    text = json.dumps(slim(trace), separators=(",", ":"))
    with replacing(path) as out, gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as zipped:
        zipped.write(text.encode())
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def slim(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace without what a profile does not read."""
    kept = {key: value for key, value in trace.items() if key not in DROPPED_KEYS}
    kept["traceEvents"] = [event for event in trace["traceEvents"] if is_read(event)]
    return kept


def is_read(event: dict[str, Any]) -> bool:
    """Whether `epfuse profile` reads the event."""
    category = event.get("cat")
    if category == "python_function":
        return str(event.get("name")).startswith(MODULE_PREFIX)
    return event.get("ph") == "X" and category not in DROPPED_CATEGORIES


def short_device_name(device: torch.device) -> str:
    """``h100`` of "NVIDIA H100 80GB HBM3", ``mi300x`` of "AMD Instinct MI300X"."""
    if device.type != "cuda":
        return device.type
    match = re.search(r"\b(?:[ABH]\d{2,3}|MI\d{3}X?)\b", torch.cuda.get_device_name(device))
    return match[0].lower() if match else "gpu"


def main() -> None:
    """Record both traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to; it is made if it is missing")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (the traces have no kernels)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    name = short_device_name(device)
    model = build_model(SIZE, torch.bfloat16, device)
    seed_weights(model, 0)
    record(model, device, arguments.out / f"{name}-transformers-experts.trace.json.gz")
    replace_experts(model, EPGroup.single())
    record(model, device, arguments.out / f"{name}-epfuse-experts.trace.json.gz")


if __name__ == "__main__":
    main()
