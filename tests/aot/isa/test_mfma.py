"""Matrix instructions against torch, element by element where each lane's elements lie, and their wait states."""

import numpy as np
import pytest
import torch

from epfuse.aot.isa.errors import HazardError
from epfuse.aot.isa.mfma import SHAPES
from tests.aot.isa.assembly import decode, execute, floats, is_undefined, program, vector

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "fp8": torch.float8_e4m3fnuz}


def dtype_of(name: str) -> torch.dtype:
    return DTYPES[name.rsplit("_", 1)[1]]


def place(matrix: torch.Tensor, dtype: torch.dtype, depth: int) -> np.ndarray:
    """Registers [registers, 64] of A, [rows, depth], by the formula of AMD's matrix instruction calculator.

    For one block: element [i][k] is in lane ``i + rows * (k // each)`` and there the ``k % each``th.
    """
    rows = matrix.shape[0]
    each = depth // (64 // rows)
    size = dtype.itemsize
    raw = np.zeros((64, each * size), np.uint8)
    encoded = matrix.to(dtype).contiguous().view(torch.uint8).numpy().reshape(rows, depth, size)
    for row in range(rows):
        for k in range(depth):
            lane, element = row + rows * (k // each), k % each
            raw[lane, element * size : (element + 1) * size] = encoded[row, k]
    return raw.view(np.uint32).T


def result_of(wave: object, first: int, rows: int) -> np.ndarray:
    """D [rows, rows], by the calculator's formula of the output."""
    out = np.zeros((rows, rows), np.float32)
    for i in range(rows):
        for j in range(rows):
            if rows == 16:
                lane, register = j + 16 * (i // 4), i % 4
            else:
                lane, register = j + 32 * (i // 4 % 2), 4 * (i // 8) + i % 4
            out[i, j] = floats(wave, first + register)[lane]  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_product_is_torchs(name: str) -> None:
    shape, dtype = SHAPES[name], dtype_of(name)
    torch.manual_seed(0)
    a, b = (torch.randint(-8, 9, (shape.rows, shape.depth)).float() / 4 for _ in range(2))
    a_rows, b_rows = place(a, dtype, shape.depth), place(b, dtype, shape.depth)
    n, results = shape.registers, shape.results
    vectors: dict[int, object] = {32 + row: a_rows[row] for row in range(n)} | {
        40 + row: b_rows[row] for row in range(n)
    }
    span_a, span_b = ("v32", "v40") if n == 1 else (f"v[32:{31 + n}]", f"v[40:{39 + n}]")
    body = f"{name} v[0:{results - 1}], {span_a}, {span_b}, 0\ns_nop 15\ns_nop 15"
    wave = execute(body, vectors=vectors, active=1)
    np.testing.assert_array_equal(result_of(wave, 0, shape.rows), (a @ b.T).numpy())
    # C has D's layout: a second multiplication adds to the first
    multiply = f"{name} v[0:{results - 1}], {span_a}, {span_b}, "
    body = f"{multiply}1.0\n{multiply}v[0:{results - 1}]"
    wave = execute(body, vectors=vectors)
    np.testing.assert_array_equal(result_of(wave, 0, shape.rows), (2 * (a @ b.T) + 1).numpy())


def test_accumulation_registers() -> None:
    """As Triton 3.6 has them: A, B, C and D in either file, loads into them and stores from them."""
    rows = place(torch.eye(16), torch.bfloat16, 16)
    body = """
        v_accvgpr_write_b32 a4, v6
        v_accvgpr_write_b32 a5, v7
        s_nop 1
        v_mfma_f32_16x16x16_bf16 a[0:3], a[4:5], v[6:7], 1.0
        v_mfma_f32_16x16x16_bf16 a[0:3], v[6:7], a[4:5], a[0:3]
        s_nop 6
        ds_write_b128 v9, a[0:3]
        s_waitcnt lgkmcnt(0)
        ds_read_b128 a[8:11], v9
        s_waitcnt lgkmcnt(0)
        v_accvgpr_read_b32 v0, a8
        v_accvgpr_read_b32 v1, a9
        v_accvgpr_read_b32 v2, a10
        v_accvgpr_read_b32 v3, a11
    """
    wave = execute(body, vectors={6: rows[0], 7: rows[1], 9: 16 * np.arange(64)})
    np.testing.assert_array_equal(result_of(wave, 0, 16), 1 + 2 * np.eye(16))


def test_subnormals_and_one_rounding() -> None:
    tiny = torch.full((16, 16), 2.0**-130)
    wave = execute(
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0",
        vectors={
            row: part
            for first, m in ((4, tiny), (6, torch.ones(16, 16)))
            for row, part in enumerate(place(m, torch.bfloat16, 16), first)
        },
    )
    assert floats(wave)[0] == np.float32(2.0**-126)


def test_only_what_depends_on_undefined_bits_is_undefined() -> None:
    rows = place(torch.ones(16, 16), torch.bfloat16, 16)
    wave = execute(
        "v_mov_b32_e32 v4, v8\nv_mov_b32_e32 v5, v8\nv_mov_b32_e32 v4, v9\ns_nop 1\n"
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0",
        vectors={6: rows[0], 7: rows[1], 8: rows[0]},
    )
    assert all(is_undefined(wave, row) for row in range(4))
    wave = execute("v_mfma_f32_16x16x16_bf16 v[0:3], v[6:7], v[6:7], 0", vectors={6: rows[0], 7: rows[1]})
    assert not any(is_undefined(wave, row) for row in range(4))
    assert vector(wave, 0)[0] == 0x41800000


WAITS = [
    # XDL, 4 passes: a vector instruction waits 7, A and B too, another C 5, the same C not at all
    ("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0", "v_mov_b32_e32 v8, v0", 7),
    ("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0", "v_mov_b32_e32 v0, 0", 7),
    ("v_mfma_f32_16x16x32_fp8_fp8 v[0:3], v[4:5], v[6:7], 0", "v_mov_b32_e32 v8, v3", 7),
    ("v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], 0", "ds_write_b32 v4, v1", 7),
    ("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0", "v_mfma_f32_16x16x16_bf16 v[8:11], v[0:1], v[6:7], 0", 7),
    (
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0",
        "v_mfma_f32_16x16x16_bf16 v[8:11], v[4:5], v[6:7], v[2:5]",
        5,
    ),
    (
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0",
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]",
        0,
    ),
    # XDL, 8 passes
    ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], 0", "v_mov_b32_e32 v20, v15", 11),
    ("v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], 0", "v_mov_b32_e32 v20, v15", 11),
    ("v_mfma_f32_32x32x16_fp8_fp8 v[0:15], v[16:17], v[18:19], 0", "v_mov_b32_e32 v20, v15", 11),
    # not XDL, 8 passes
    ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0", "v_mov_b32_e32 v8, v0", 10),
    ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0", "v_mfma_f32_16x16x4_f32 v[8:11], v0, v5, 0", 10),
    # C of an XDL instruction is read late
    ("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[8:11]", "v_mov_b32_e32 v8, 0", 3),
    ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[20:35]", "v_mov_b32_e32 v20, 0", 7),
]


@pytest.mark.parametrize(("first", "second", "states"), WAITS)
def test_wait_states(first: str, second: str, states: int) -> None:
    def body(nops: int) -> str:
        pause = "\n".join(["s_nop 0"] * nops)
        return f"{first}\n{pause}\n{second}" if nops else f"{first}\n{second}"

    vectors = dict.fromkeys(range(40), 0)
    execute(body(states), vectors=vectors)
    if states:
        with pytest.raises(HazardError, match=f"{states - 1} wait states after line 5"):
            execute(body(states - 1), vectors=vectors)


def test_passes_are_a_fourth_of_the_clocks() -> None:
    # 16x16: 4 passes; 32x32: 8; FP32 runs at a quarter of the rate
    assert {name: shape.passes for name, shape in SHAPES.items()} == {
        name: (4 if "16x16" in name else 8) * (2 if name.endswith("_f32") else 1) for name in SHAPES
    }
    assert decode(program("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, 0"))[0].facts["xdl"] == 0
