"""The quantise kernel compiles, without the GPU, for both vendors, and multiplies subnormals unflushed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# a process of its own: this one may have Triton's interpreter switched on
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from epfuse.stages.quantize.kernel import quantize_kernel

backend, arch, warp, stage, source = sys.argv[1:]
names = {"x": f"*{source}", "codes": "*u8", "scales": "*u8", "K": "i32", "G": "i32", "row_stride": "i32"}
for fnuz in (False, True):
    constexprs = {"BLOCK_G": 32, "GROUP": 32, "FNUZ": fnuz}
    signature = names | dict.fromkeys(constexprs, "constexpr")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    kernel = ASTSource(fn=quantize_kernel, signature=signature, constexprs=constexprs)
    print(triton.compile(kernel, target=target).asm[stage])
"""


@pytest.mark.parametrize("source", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", ["hip gfx942 64 amdgcn", "cuda 90 32 ptx"])
def test_compiles_ahead_of_time(target: str, source: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "compile_quantize.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script), *target.split(), source], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "hip" in target:
        assert done.stdout.count(".amdhsa_float_denorm_mode_32 3") == 2
    else:
        assert done.stdout.count(".entry quantize_kernel") == 2
        assert ".ftz" not in done.stdout
