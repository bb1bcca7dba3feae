"""The kernels of the FP8 paths compile without the GPU, for every target, to native FP8 dots and without spills."""

from __future__ import annotations

import os
import re
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
from epfuse.stages.activate.kernel import activate_kernel
from epfuse.stages.down.kernel_fp8 import down_fp8_kernel
from epfuse.stages.gate_up.kernel_fp8 import gate_up_fp8_kernel
from epfuse.families.portable_fp8 import FP8_TILES
from epfuse.target import Target

target, backend, arch, warp, values, stage = sys.argv[1:]
gpu = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
INTS = ("R", "H", "I", "G")


def compile(kernel, types, constexprs, **options):
    names = kernel.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {name: types.get(name, "i32" if name in INTS else "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if str(signature[name]).startswith("*") or name in ("H", "I", "G")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    print("==", kernel.fn.__name__)
    print(triton.compile(source, target=gpu, options=options).asm[stage])


table = {"sorted_routes": "*i32", "block_expert": "*i32", "num_padded": "*i32"}
for tiles in {entry.tiles for entry in FP8_TILES[Target(target)]}:
    for group, rows, scale in ((32, 1, "*u8"), (128, 128, "*fp32")):
        pairs = [(gate_up_fp8_kernel, tiles.gate_up, False), (down_fp8_kernel, tiles.down, False)]
        pairs += [(down_fp8_kernel, tiles.down, True)] if tiles.block_m == 16 else []
        for kernel, tile, atomic in pairs:
            types = dict.fromkeys(("x", "y", "w13", "w2"), values) | dict.fromkeys(("x_scale", "y_scale"), "*u8")
            types |= {"w13_scale": scale, "w2_scale": scale, "topk_weights": "*fp32", **table}
            types |= {"out": "*fp32" if atomic else "*bf16"}
            constexprs = {
                "K": 4, "BLOCK_M": tiles.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m, "GROUP": group, "SCALE_ROWS": rows, "EVEN_K": True, "ATOMIC": atomic,
                "bias": None, "INPUTS": 2,
            }
            compile(kernel, types, constexprs, num_warps=tile.num_warps, num_stages=tile.num_stages)
for group in (32, 128):
    types = {"gate_up": "*bf16", "codes": "*u8", "scales": "*u8", "activation": ("fp32",) * 3}
    constexprs = {"BLOCK_R": 4, "BLOCK_G": 512 // group, "GROUP": group, "FNUZ": target == "gfx942"}
    constexprs |= {"ACTIVATION": "swiglu_oai", "INPUTS": 2}
    compile(activate_kernel, types | table, constexprs, num_warps=4)
"""


def compiled(arguments: str, folder: Path) -> dict[str, list[str]]:
    """Kernel name -> the assembly of each of its variants."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    script = folder / "compile_fp8.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script), *arguments.split()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    for part in done.stdout.split("== ")[1:]:
        name, _, assembly = part.partition("\n")
        found.setdefault(name, []).append(assembly)
    assert {"gate_up_fp8_kernel", "down_fp8_kernel", "activate_kernel"} == set(found)
    return found


@pytest.mark.parametrize("target", ["gfx942 hip gfx942 64 *fp8e4b8 amdgcn", "gfx950 hip gfx950 64 *fp8e4nv amdgcn"])
def test_amd(target: str, tmp_path: Path) -> None:
    for name, variants in compiled(target, tmp_path).items():
        for assembly in variants:
            assert re.search(r"\.vgpr_spill_count:\s+0\n", assembly)
            if name != "activate_kernel":
                assert re.search(r"v_mfma_f32_\w+_(fp8_fp8|f8f6f4) ", assembly)
                assert not re.search(r"v_mfma_f32_\w+_(bf16|f16)", assembly)


def test_hopper(tmp_path: Path) -> None:
    found = compiled("sm_90 cuda 90 32 *fp8e4nv ptx", tmp_path)
    for name in ("gate_up_fp8_kernel", "down_fp8_kernel"):
        for assembly in found[name]:
            assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", assembly)
    assert sum("atom.global.gpu.relaxed.add" in assembly for assembly in found["down_fp8_kernel"]) == 2
    assert not any(".ftz" in assembly for variants in found.values() for assembly in variants)
