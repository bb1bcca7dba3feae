"""A process that has made one of epfuse's kernels, without a GPU (`test_kernel_cache.py`). Prints what it did as JSON.

usage: python cache.py plain|inductor|warm|bundled
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from epfuse.config import LayerShape, Path
from epfuse.families.family import CallKind
from epfuse.target import Target, planning_for
from tests.compiled import keys


class Driver(DriverBase):
    """Of an H100 that is not there: kernels are compiled and loaded, launches do nothing."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(name, kernel, shared, device):
            return object(), object(), 1, 0, 1024

    class launcher_cls:
        def __init__(self, src, metadata):
            pass

        def __call__(self, *arguments):
            launched.append(arguments)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


MOST = 2  # tokens of a warm-up
launched: list[object] = []
pythons: list[object] = []
compiled: list[tuple[str, bool]] = []


def listen(*, src, metadata, metadata_group, times, cache_hit):
    compiled.append((src.name, cache_hit))


def count_pythons(event: str, given: tuple[Any, ...]) -> None:
    """Of the processes that are begun; Triton begins others, to ask ptxas for its version."""
    if event == "subprocess.Popen" and given[0] == sys.executable:
        pythons.append(given)


@triton.jit
def stranger(x):
    """Somebody else's kernel."""
    tl.store(x, 1.0)


def make_inductors_kernel() -> None:
    """What inductor does when it makes a kernel: the same constructor."""
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, HeuristicType

    @triton.jit
    def nothing(x):
        pass

    device = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, warp_size=32)
    meta = {"device": device, "signature": {}, "constants": {}, "configs": []}
    CachingAutotuner(
        nothing,
        triton_meta=meta,
        configs=[triton.Config({})],
        save_cache_hook=None,
        mutated_arg_names=[],
        optimize_mem=False,
        heuristic_type=HeuristicType.POINTWISE,
    )


def main(way: str) -> None:
    triton.runtime.driver.set_active(Driver())
    knobs.compilation.listener = listen
    from epfuse import kernel_cache
    from epfuse.stages.combine.launch import launch_combine

    done: dict[str, object] = {}
    sys.addaudithook(count_pythons)
    if way == "inductor":
        make_inductors_kernel()
    if way == "warm":
        done = warm(keys.LAYERS["sm_90-bf16-deterministic"])
    elif way == "bundled":  # the model of `test_bundle.py`
        shape = LayerShape(hidden=256, intermediate=128, experts=4, local_experts=4, top_k=2)
        done = warm(CallKind(Path.BF16, Target.SM90, shape))
    else:
        with planning_for(Target.SM90, stand_in="cpu"):
            rows, ids = torch.empty(6, 64, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int32)
            stranger[(1,)](torch.empty(1))
            launch_combine(rows, ids, torch.zeros(4, dtype=torch.int32), 4, torch.empty(2, 64, dtype=torch.bfloat16))
    done |= {
        "pythons": len(pythons),
        "compiled": compiled,
        "launched": len(launched),
        "late": kernel_cache.late_compiles(),
    }
    print(json.dumps({"moved": os.environ.get("TRITON_CACHE_DIR"), **done}))


def warm(layer: CallKind) -> dict[str, object]:
    """A warm-up, then drawn calls: what was said, and how many kernels Triton had looked for before the calls."""
    from epfuse.compiled.warm_up import warm_up

    said = list[str]()
    begun = time.process_time()
    for _ in range(2):  # a second layer of the same kind
        warm_up(layer, MOST, said.append)
    took = time.process_time() - begun
    before = len(compiled)
    assert not launched
    with planning_for(layer.target, layer.device, stand_in="cpu"):
        keys.drawn(layer, seed=3, count=25, most=MOST)()
    return {"said": said, "before": before, "cpu_s": took}


if __name__ == "__main__":
    main(sys.argv[1])
