"""How much code the persistent kernel has: that is what compiling it takes, a second or two for a copy of a loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# a process of its own: this one may have Triton's interpreter switched on
COUNT = """
import triton
from triton.backends.nvidia.compiler import CUDABackend
from epfuse.aot.launches import launches_of
from epfuse.compiled.layer import run_calls
from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.target import Target


class Done(Exception):
    pass


def add_stages(self, stages, *arguments, before=CUDABackend.add_stages):
    before(self, stages, *arguments)
    stages["llir"] = count  # what comes then takes ten times as long


def count(module, metadata):
    lines = str(module).splitlines()
    print(*(sum(name in line for line in lines) for name in ("ttng.warp_group_dot ", "tt.store ")))
    raise Done


CUDABackend.add_stages = add_stages
shape = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4)
kind = CallKind(Path.W8A16, Target.SM90, shape, frozenset({WeightFormat.FRAGMENT}))
found = launches_of(kind.target, lambda: run_calls(kind, [2000]), kind.device)
(launch,) = (one for one in found if one.kernel == "gate_up_down_sm90_kernel")
constants = dict(launch.constants)
print(constants["BLOCK_M"], constants["HEAD"], constants["CONSUMERS"])
try:
    launch.compile()
except Done:
    pass
"""


def test_both_gemms_share_their_loops_and_all_steps_the_store_of_the_head(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tile, counts = (tuple(int(word) for word in line.split()) for line in done.stdout.splitlines())
    assert tile == (128, 64, 3)
    heads, rests, consumers = 4, 3, 3  # of column_steps: each has the head, all but the first one a part of the rest
    products = heads + rests
    stores = 1 + rests  # of gate_up, and as many of down
    assert counts == (consumers * products, consumers * 2 * stores)
