"""Hopper's BF16 products of FP8 weights with one scale a row, against float64: on a GPU, and in numpy off it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from epfuse import SwiGLUOAI
from epfuse.stages import sm90_codes, sm90_gemm, sm90_layouts
from epfuse.stages.down import kernel_sm90 as down_kernel
from epfuse.stages.down import reference as down_reference
from epfuse.stages.gate_up import kernel_sm90 as gate_up_kernel
from epfuse.stages.gate_up import reference as gate_up_reference
from epfuse.stages.tiles import Sm90Tile
from epfuse.weights.panels import RowOrder
from epfuse.weights.row_fp8 import pack_rows
from tests.cases import ROUTINGS, topk_ids_for
from tests.stages.plain_gluon import numbers, plain
from tests.stages.plain_memory import BFLOAT16, COPIES, FLOAT32, INT32, UINT8, PlainMachine, Pointers, multiply
from tests.stages.test_gemms import SNR_FLOOR, check_rows
from tests.stages.test_sm90 import clone, launch, poisoned, random_mxfp8, slots_on, table_of

ACTIVATION = SwiGLUOAI()
LOCAL, EXPERTS, TOP_K = 5, 24, 4
TILES = {
    "8x64": (8, Sm90Tile(64, 128, 0, 4, 4)),
    "8x64_split": (8, Sm90Tile(64, 128, 0, 4, 3, split_k=8)),
    "8x128_guess": (8, Sm90Tile(128, 128, 0, 4, 4, guess_bytes=512)),
    "16x128_8warps": (16, Sm90Tile(128, 128, 0, 8, 4)),
    "32x128": (32, Sm90Tile(128, 128, 0, 4, 3)),
    "64x128_grouped": (64, Sm90Tile(128, 128, 4, 8, 3)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"), [(37, 256, 384), (300, 512, 256), (1, 256, 256), (20, 288, 160), (20, 96, 96)]
)
def test_both_gemms(device, tokens, hidden, intermediate, routing, name):
    """On the numbers that the packed weights stand for."""
    block_m, tile = TILES[name]
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = table_of(ids, slots_on(device), block_m, tile, hidden, intermediate)
    rows = ((ids >= 0) & (ids < LOCAL)).reshape(-1).nonzero().squeeze(1)
    g = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8).to(device, torch.bfloat16)
    topk_weights = torch.rand(tokens, TOP_K, generator=g).to(device)

    packed = pack_rows(clone(random_mxfp8(device, 2 * intermediate, hidden, 1)), RowOrder.GATE_UP)
    y = poisoned(tokens * TOP_K, intermediate, device)
    launch(y, "gate_up", x, packed, routes, tile)
    want = gate_up_reference.gate_up(x, packed, routes, TOP_K, ACTIVATION, torch.float64)
    check_rows(y, want, rows, SNR_FLOOR[torch.bfloat16])

    packed = pack_rows(clone(random_mxfp8(device, hidden, intermediate, 2)), RowOrder.PLAIN)
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, packed, routes, tile, topk_weights)
    want = down_reference.down(y.double(), packed, routes, topk_weights, torch.float64)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])


@pytest.mark.gpu
def test_nan_tiny_and_large_numbers(device):
    """A NaN in a row of weights makes that row's results NaN and no others; sums neither overflow nor vanish early."""
    tokens, hidden, intermediate = 37, 256, 128
    block_m, tile = TILES["8x64"]
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K).to(device)
    routes = table_of(ids, slots_on(device), block_m, tile, hidden, intermediate)
    rows = ((ids >= 0) & (ids < LOCAL)).reshape(-1).nonzero().squeeze(1)
    y = torch.randn(tokens * TOP_K, intermediate, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    y[0::3] *= 1e35
    y[1::3] *= 1e-35
    topk_weights = torch.ones(tokens, TOP_K, device=device)
    weights = random_mxfp8(device, hidden, intermediate, 2)
    clean = pack_rows(clone(weights), RowOrder.PLAIN)
    weights.values.view(torch.uint8)[:, 5, 70] = 0xFF
    packed = pack_rows(clone(weights), RowOrder.PLAIN)
    out = poisoned(tokens * TOP_K, hidden, device)
    launch(out, "down", y, packed, routes, tile, topk_weights)
    assert out[rows, 5].isnan().all()
    want = down_reference.down(y.double(), clean, routes, topk_weights, torch.float64)
    out[rows, 5] = want[rows, 5].to(out.dtype)
    check_rows(out, want, rows, SNR_FLOOR[torch.bfloat16])


@pytest.mark.parametrize("stage", ["gate_up", "down"])
@pytest.mark.parametrize(("split", "shares", "tail"), [(0, 1, False), (1, 2, False), (0, 1, True), (1, 2, True)])
@pytest.mark.parametrize("columns", [512, 288])
def test_a_tile_against_float64(columns: int, split: int, shares: int, tail: bool, stage: str) -> None:
    """The kernels' own code in numpy: padding rows of x, a panel past the expert's last, K cut short, every scale."""
    expert, block_m, block_n, n = LOCAL - 1, 8, 128, 1
    rows = 192 if stage == "down" else 2 * 96  # three panels: the second tile's last one is none
    weights = random_mxfp8("cpu", rows, columns, 1)
    packed = pack_rows(clone(weights), RowOrder.PLAIN)
    tokens, top_k = 6, 2
    routes = torch.tensor([11, 2, 7, 4, *[tokens * top_k] * 4], dtype=torch.int32)
    read = routes if stage == "down" else routes // top_k
    x = torch.randn(tokens * top_k, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    operands = [Pointers.to_tensor(x, BFLOAT16), Pointers.to_tensor(packed.codes.view(torch.uint8), UINT8)]
    operands += [Pointers.to_tensor(packed.scales, FLOAT32), None]
    routes_at, padded = Pointers.to_tensor(routes, INT32), packed.steps * 128
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128, "STAGES": 3}
    tile |= {"SPLIT_K": 1 if tail else shares, "TAIL_SPLIT": 2 if tail else 1, "EVEN_K": columns == padded}
    place = (None, numbers(0), split, shares, numbers(expert), numbers(n), tokens * top_k)
    got = []
    others = {
        "async_copy": COPIES,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": lambda pending, deps: deps[0],
        "fence_async_shared": lambda: None,
        "wait_for_previous_kernel": lambda: None,
        "codes_to_bf16": lambda codes: torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy() / 256,
        "sum_of_shares": lambda acc, *_: (acc, True),
        "store_activated": lambda acc, *_: got.append(np.asarray(acc)),
        "store_weighted": lambda acc, *_: got.append(np.asarray(acc)),
    }
    with plain(gate_up_kernel, down_kernel, sm90_gemm, sm90_layouts, machine=PlainMachine, **others):
        if stage == "down":
            down_kernel.down_tile(
                *operands, None, None, routes_at, None, *place, rows, columns, padded, packed.panels, **tile
            )  # fmt: skip
        else:
            gate_up_kernel.gate_up_tile(
                *operands, None, routes_at, None, *place, columns, rows // 2, padded, packed.panels, None, top_k,
                **tile, ACTIVATION=None,
            )  # fmt: skip
    steps = -(-packed.steps // shares)
    inside = slice(split * steps * 128, (split + 1) * steps * 128)
    w = packed.matrix(expert, torch.float64)[n * block_n :, inside]
    want = w @ x[read[:4].long(), inside].double().T
    torch.testing.assert_close(torch.from_numpy(got[0])[:64, :4], want, rtol=1e-12, atol=1e-12)
    assert not got[0][:, 4:].any()


def test_codes_and_numbers_of_x_meet() -> None:
    """At every k of wgmma lie a code and a number that have the same k, for each half of a stage and any panel."""
    block_n, k_padded, step = 128, 384, 1
    own, across = sm90_layouts.code_bits.fn()
    bits = [*own, *across]  # of an offset within a row's 64 codes
    with plain(sm90_gemm, sm90_layouts):
        at = sm90_gemm.fragment_pointers(numbers(step * 64 * 128), 3, 7, k_padded, block_n, 128, 2, True)
        pairs = sm90_gemm.k_of_pair(numbers(np.arange(64)))
    assert at.shape == (2, 2, 64 * 64)
    assert sorted(pairs) == list(range(64))
    memory = np.arange(8 * k_padded * 64).reshape(8, k_padded // 128, 64, 128)  # [panels, steps, rows, 128]
    for half in range(2):
        for panel in range(2):
            rows = at[half, panel].reshape(64, 64)
            assert np.array_equal(rows, memory[3 + panel, step, :, half * 64 : half * 64 + 64])
        for offset in range(64):
            k = half * 64 + sum(bit[1] for place, bit in enumerate(bits) if offset >> place & 1)
            assert pairs[k // 2] * 2 + k % 2 == half * 64 + offset
    with plain(sm90_gemm, sm90_layouts):  # past the last panel of the expert that one is read again
        last = sm90_gemm.fragment_pointers(numbers(0), 7, 7, k_padded, block_n, 128, 2, True)
    assert np.array_equal(last[:, 0], last[:, 1])


def run_ptx(text: str, codes: list[int]) -> torch.Tensor:
    """The four BF16 that a block of PTX makes of four codes; of its instructions those that are used here."""
    value = {"$2": sum(code << 8 * place for place, code in enumerate(codes)), "0": 0}
    mask = (1 << 32) - 1

    def of(name: str) -> int:
        return value[name] if name in value else int(name, 0)

    for guard, operation, names in re.findall(r"(?m)^\s*(?:@(\w+) )?([a-z]\w+\.[\w.]+)\s+([^;]+);", text):
        if guard and not value[guard]:
            continue
        out, *inputs = (name.strip() for name in names.split(","))
        match operation:
            case "prmt.b32":
                both = [of(name) >> 8 * i & 255 for name in inputs[:2] for i in range(4)]
                picked = [of(inputs[2]) >> 4 * i & 15 for i in range(4)]
                each = [both[pick & 7] if pick < 8 else 255 * (both[pick & 7] >> 7) for pick in picked]
                value[out] = sum(byte << 8 * i for i, byte in enumerate(each))
            case "shl.b32":
                value[out] = of(inputs[0]) << of(inputs[1]) & mask
            case "and.b32":
                value[out] = of(inputs[0]) & of(inputs[1])
            case "add.u32":
                value[out] = of(inputs[0]) + of(inputs[1]) & mask
            case "setp.ne.u32":
                value[out] = of(inputs[0]) != of(inputs[1])
            case "mov.b32":
                value[out] = of(inputs[0])
            case "mul.rn.bf16x2":
                a, b = (torch.tensor([of(name) & 65535, of(name) >> 16]).to(torch.uint16) for name in inputs)
                product = (a.view(torch.bfloat16) * b.view(torch.bfloat16)).view(torch.uint16).tolist()
                value[out] = product[0] | product[1] << 16
            case _:
                raise AssertionError(operation)
    halves = [value[name] >> shift & 65535 for name in ("$0", "$1") for shift in (0, 16)]
    return torch.tensor(halves).to(torch.uint16).view(torch.bfloat16)


def assembly_of(function: object) -> str:
    """The PTX of one of `sm90_codes`' device functions."""
    found: list[str] = []

    class Language:
        bfloat16 = None

        @staticmethod
        def inline_asm_elementwise(text: str, *_: object, **__: object) -> None:
            found.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90_codes, "gl", Language)
        function.fn(None)  # type: ignore[attr-defined]
    return found[0]


def test_every_code_is_its_number() -> None:
    """All 254 of them, at each of four places of a word."""
    text = assembly_of(sm90_codes.codes_to_bf16)
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double() / 256
    for first in range(len(codes)):
        four = [(first + place * 85) % len(codes) for place in range(4)]
        assert torch.equal(run_ptx(text, [int(codes[index]) for index in four]).double(), want[four])
