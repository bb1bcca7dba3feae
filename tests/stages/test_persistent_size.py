"""How much code the persistent kernels have: that is what compiling takes, a second or two for a copy of a loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# a process of its own: this one may have Triton's interpreter switched on
COUNT = """
import sys
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
path, form, tokens, kernel = sys.argv[1:]
kind = CallKind(Path(path), Target.SM90, shape, frozenset({WeightFormat(form)}))
found = launches_of(kind.target, lambda: run_calls(kind, [int(tokens)]), kind.device)
(launch,) = (one for one in found if one.kernel == kernel)
constants = dict(launch.constants)
print(constants["BLOCK_M"], constants["HEAD"], constants["CONSUMERS"])
try:
    launch.compile()
except Done:
    pass
"""


def counted(tmp_path: Path, *arguments: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rows of a block, of its head, consumers) of a call, and (products, stores) in its kernel's code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    done = subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tile, counts = (tuple(int(word) for word in line.split()) for line in done.stdout.splitlines())
    return tile, counts


def test_both_gemms_share_their_loops_and_all_steps_the_store_of_the_head(tmp_path: Path) -> None:
    tile, counts = counted(tmp_path, "w8a16", "fragment", "2000", "gate_up_down_sm90_kernel")
    assert tile == (128, 64, 3)
    heads, rests, consumers = 4, 3, 3  # of column_steps: each has the head, all but the first one a part of the rest
    products = heads + rests
    stores = 1 + rests  # of gate_up, and as many of down
    assert counts == (consumers * products, consumers * 2 * stores)


def test_dense_weights_too(tmp_path: Path) -> None:
    tile, counts = counted(tmp_path, "bf16", "dense", "9000", "gate_up_down_sm90_dense_kernel")
    assert tile == (288, 256, 2)
    few, heads, rests, consumers = 1, 3, 2, 2  # of column_steps: a few columns of the head, or all of it
    assert counts == (consumers * (few + heads + rests), consumers * 2 * (few + 1 + rests))
