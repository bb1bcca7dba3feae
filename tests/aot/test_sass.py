"""Occupancy and instructions of NVIDIA kernels, on a made-up one."""

from __future__ import annotations

import pytest

from epfuse.aot.sass import SASS, Resources, occupancy

KERNEL = """
        /*0d90*/               @P0 BRA `(.L_x_1) ;
.L_x_1:
        /*1100*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*1110*/                   LDG.E.U8 R7, desc[UR4][R8.64] ;
        /*1120*/                   LDG.E R9, desc[UR4][R8.64] ;
        /*1140*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*1200*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*1210*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*1530*/               @P0 BRA `(.L_x_1) ;
        /*1540*/                   STL [R1], R3 ;
        /*1550*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*1560*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R8 ;
.L_x_2:
        /*1570*/                   BRA `(.L_x_2);
"""


def test_counts() -> None:
    lines = KERNEL.splitlines()
    loop = SASS.counts(SASS.main_loop(lines))
    assert dict(loop.matrix) == {"HGMMA.64x8x16.F32.BF16": 2}
    assert (loop.matrix_macs, loop.matrix_warps) == (2 * 64 * 8 * 16, 4)
    assert dict(loop.load_widths) == {16: 1, 4: 1, 1: 1}
    assert (loop.private, loop.barriers) == (0, 1)
    whole = SASS.counts(lines)
    assert dict(whole.store_widths) == {8: 1}
    assert whole.private == 1
    assert sum(whole.atomics.values()) == 1


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limits"),
    [
        (128, 0, 4, 4, ("registers",)),
        (255, 196608, 8, 1, ("registers", "shared")),
        (40, 73728, 4, 3, ("shared",)),
        (32, 0, 4, 16, ("registers", "warps")),
    ],
)
def test_blocks_of_a_multiprocessor(
    registers: int, shared: int, warps: int, blocks: int, limits: tuple[str, ...]
) -> None:
    seen = occupancy(Resources(registers, 0, 0, shared, warps))
    assert (seen.blocks_per_sm, seen.limits) == (blocks, limits)
