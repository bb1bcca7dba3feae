"""Traces that tests make: a step's kernels as servers run them, as Chrome JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
MI300X = DATA / "mi300x-vllm-decode-gptoss.trace.json.gz"

GEMM = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
NORM = "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>"
TOPK = "void vllm::moe::topkGating<4, 128, 4, 16, 32, int, float>"
ACT = "void vllm::act_and_mul_kernel<c10::BFloat16, vllm::silu_kernel>"
ATTENTION_HALF = [
    NORM,
    GEMM,
    "void vllm::rotary_embedding_kernel<c10::BFloat16, true>",
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>",
    "kernel_unified_attention_2d",
    GEMM,
    NORM,
]
DENSE_LAYER = [*ATTENTION_HALF, GEMM, ACT, GEMM]
EXPERTS = [
    "void vllm::moe::moe_align_block_size_kernel<int>",
    "fused_moe_kernel",
    ACT,
    "fused_moe_kernel",
    "void vllm::moe::moe_sum_kernel<c10::BFloat16, 4>",
]
MOE_LAYER = [*ATTENTION_HALF, GEMM, TOPK, *EXPERTS]
HEAD = ["void at::native::vectorized_gather_kernel<16, long>"]
TAIL = [NORM, GEMM, "void at::native::reduce_kernel<512, 1, at::native::ArgMaxOps>"]


class TraceFile:
    """A trace under construction; times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.other: dict[str, Any] = {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "numSms": 132, "warpSize": 32}],
        }
        self.correlation = 0

    def kernel(self, name: str, ts: float, dur: float, **where: Any) -> None:
        """A kernel; ``where``: device, stream, correlation, cat."""
        category = where.pop("cat", "kernel")
        arguments = {"device": 0, "stream": 7} | where
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur, "args": arguments}
        )

    def launch(self, ts: float, dur: float, name: str = "cudaLaunchKernel", thread: int = 1) -> int:
        """A launching call; returns its correlation id."""
        self.correlation += 1
        self.events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": name, "pid": 9, "tid": thread, "ts": ts, "dur": dur}
            | {"args": {"correlation": self.correlation}}
        )
        return self.correlation

    def range(self, name: str, ts: float, dur: float, cat: str = "user_annotation", thread: int = 1) -> None:
        """A named range on the host."""
        self.events.append({"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": thread, "ts": ts, "dur": dur})

    def sequence(self, names: list[str], ts: float, dur: float = 4.0, pause: float = 1.0, **where: Any) -> float:
        """Kernels one after the other, each launched 20 us before it starts; returns the last one's end."""
        for name in names:
            self.kernel(name, ts, dur, **({"correlation": self.launch(ts - 20, 2)} | where))
            ts += dur + pause
        return ts - pause

    def write(self, path: Path) -> Path:
        """As JSON, gzipped if the name says so."""
        data = json.dumps(self.other | {"traceEvents": self.events}).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path


def server_step(trace: TraceFile, label: str, ts: float, dense: int = 1, moe: int = 4, annotate: bool = True) -> float:
    """A step as vLLM runs it: embedding, layers, logits. Returns its end."""
    names = HEAD + DENSE_LAYER * dense + MOE_LAYER * moe + TAIL
    end = trace.sequence(names, ts)
    if annotate:
        trace.range(label, ts - 25, end - ts + 5)
    return end
