"""Scalar instructions, with values worked out by hand from AMD's descriptions."""

import numpy as np
import pytest

from epfuse.aot.isa.errors import ExecutionError, UndefinedError
from epfuse.aot.isa.registers import EXEC, VCC
from tests.aot.isa.assembly import execute

LOW = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("line", "a", "b", "result", "scc"),
    [
        ("s_add_i32 s0, s2, s3", 0x7FFFFFFF, 1, 0x80000000, 1),
        ("s_add_i32 s0, s2, s3", LOW, 1, 0, 0),
        ("s_add_u32 s0, s2, s3", LOW, 1, 0, 1),
        ("s_add_u32 s0, s2, s3", 5, 6, 11, 0),
        ("s_sub_i32 s0, s2, s3", 0x80000000, 1, 0x7FFFFFFF, 1),
        ("s_sub_i32 s0, s2, s3", 3, 5, 0xFFFFFFFE, 0),
        ("s_sub_u32 s0, s2, s3", 3, 5, 0xFFFFFFFE, 1),
        ("s_mul_i32 s0, s2, s3", 0x10001, 0x10001, 0x20001, None),
        ("s_mul_hi_u32 s0, s2, s3", LOW, LOW, 0xFFFFFFFE, None),
        ("s_mul_hi_i32 s0, s2, s3", LOW, 7, LOW, None),
        ("s_min_i32 s0, s2, s3", LOW, 3, LOW, 1),
        ("s_min_i32 s0, s2, s3", 3, 3, 3, 0),
        ("s_max_i32 s0, s2, s3", LOW, 3, 3, 0),
        ("s_max_i32 s0, s2, s3", 3, 3, 3, 1),
        ("s_min_u32 s0, s2, s3", LOW, 3, 3, 0),
        ("s_max_u32 s0, s2, s3", LOW, 3, LOW, 1),
        ("s_and_b32 s0, s2, s3", 12, 10, 8, 1),
        ("s_and_b32 s0, s2, s3", 12, 3, 0, 0),
        ("s_or_b32 s0, s2, s3", 12, 10, 14, 1),
        ("s_xor_b32 s0, s2, s3", 12, 12, 0, 0),
        ("s_andn2_b32 s0, s2, s3", 14, 6, 8, 1),
        ("s_lshl_b32 s0, s2, s3", 3, 33, 6, 1),
        ("s_lshr_b32 s0, s2, s3", 0x80000000, 31, 1, 1),
        ("s_ashr_i32 s0, s2, s3", 0x80000000, 31, LOW, 1),
        # offset in bits 4:0, width in bits 22:16
        ("s_bfe_u32 s0, s2, s3", 0xABCD1234, 0x80008, 0x12, 1),
        ("s_bfe_i32 s0, s2, s3", 0x0000F000, 0x4000C, LOW, 1),
        ("s_bfe_i32 s0, s2, s3", 0x00007000, 0x4000C, 7, 1),
        ("s_bfe_i32 s0, s2, 0x10000", 1, 0, LOW, 1),
        ("s_lshl1_add_u32 s0, s2, s3", 0x80000000, 5, 5, 1),
        ("s_lshl2_add_u32 s0, s2, s3", 3, 5, 17, 0),
        ("s_abs_i32 s0, s2", 0xFFFFFFFD, 0, 3, 1),
        ("s_abs_i32 s0, s2", 0x80000000, 0, 0x80000000, 1),
        ("s_not_b32 s0, s2", LOW, 0, 0, 0),
        ("s_brev_b32 s0, s2", 0x80000001, 0, 0x80000001, None),
        ("s_brev_b32 s0, 1", 0, 0, 0x80000000, None),
        ("s_movk_i32 s0, 0x8000", 0, 0, 0xFFFF8000, None),
        ("s_mov_b32 s0, -1", 0, 0, LOW, None),
        ("s_mov_b32 s0, 1.0", 0, 0, 0x3F800000, None),
    ],
)
def test_arithmetic(line: str, a: int, b: int, result: int, scc: int | None) -> None:
    # SCC is undefined at first; s_cmp_eq makes it 1 where the instruction must leave it
    wave = execute(f"s_cmp_eq_u32 s2, s2\n{line}", scalars={2: a, 3: b})
    assert wave.scalars[0] == result
    assert wave.scc == (1 if scc is None else scc)


def test_add_with_a_short_constant_sets_scc_on_signed_overflow() -> None:
    wave = execute("s_addk_i32 s0, 0x7fff", scalars={0: 0x7FFFFFFF})
    assert (wave.scalars[0], wave.scc) == (0x80007FFE, 1)
    wave = execute("s_addk_i32 s0, 0xff80", scalars={0: 0x80})
    assert (wave.scalars[0], wave.scc) == (0, 0)


def test_carries() -> None:
    wave = execute("s_add_u32 s0, s2, s4\ns_addc_u32 s1, s3, s5", scalars={2: LOW, 3: 1, 4: 1, 5: 2})
    assert wave.pair(0) == (0x1_FFFFFFFF + 0x2_00000001)
    wave = execute("s_sub_u32 s0, s2, s4\ns_subb_u32 s1, s3, s5", scalars={2: 0, 3: 2, 4: 1, 5: 0})
    assert wave.pair(0) == 0x2_00000000 - 1


@pytest.mark.parametrize(
    ("line", "result", "scc"),
    [
        ("s_and_b64 s[0:1], s[2:3], s[4:5]", 0x1_00000004, 1),
        ("s_or_b64 s[0:1], s[2:3], s[4:5]", 0x3_0000000C, 1),
        ("s_andn2_b64 s[0:1], s[2:3], s[4:5]", 0x2_00000000, 1),
        ("s_xor_b64 s[0:1], s[2:3], s[4:5]", 0x2_00000008, 1),
        ("s_lshl_b64 s[0:1], s[2:3], 4", 0x30_00000040, 1),
        ("s_lshr_b64 s[0:1], s[2:3], 33", 1, 1),
        ("s_not_b64 s[0:1], s[2:3]", 0xFFFFFFFC_FFFFFFFB, 1),
        ("s_mov_b64 s[0:1], -1", (1 << 64) - 1, None),
        ("s_cselect_b64 s[0:1], -1, 0", (1 << 64) - 1, None),
        ("s_cselect_b32 s0, 7, 9", None, None),
    ],
)
def test_pairs(line: str, result: int | None, scc: int | None) -> None:
    wave = execute(f"s_cmp_eq_u32 s2, s2\n{line}", scalars={2: 4, 3: 3, 4: 0xC, 5: 1})
    if result is None:
        assert wave.scalars[0] == 7
    else:
        assert wave.pair(0) == result
    assert wave.scc == (1 if scc is None else scc)


@pytest.mark.parametrize(
    ("line", "a", "b", "scc"),
    [
        ("s_cmp_lt_i32 s0, s1", LOW, 0, 1),
        ("s_cmp_lt_u32 s0, s1", LOW, 0, 0),
        ("s_cmp_gt_i32 s0, s1", 0, LOW, 1),
        ("s_cmp_ge_u32 s0, s1", 4, 4, 1),
        ("s_cmp_ge_i32 s0, s1", LOW, 4, 0),
        ("s_cmp_le_u32 s0, s1", 4, 4, 1),
        ("s_cmp_eq_u32 s0, s1", 4, 5, 0),
        ("s_cmp_lg_u32 s0, s1", 4, 5, 1),
        ("s_cmpk_lt_i32 s0, 0xff80", 0xFFFFFF00, 0, 1),
        ("s_cmpk_gt_i32 s0, 0x7f", 0x80, 0, 1),
        ("s_cmpk_lt_u32 s0, 0x8000", 0x7FFF, 0, 1),
        ("s_bitcmp0_b32 s0, 3", 8, 0, 0),
        ("s_bitcmp1_b32 s0, 3", 8, 0, 1),
    ],
)
def test_comparisons(line: str, a: int, b: int, scc: int) -> None:
    assert execute(line, scalars={0: a, 1: b}).scc == scc


def test_saveexec() -> None:
    wave = execute("s_and_saveexec_b64 s[0:1], s[2:3]", scalars={2: 0xF0, 3: 0}, active=0x3C)
    assert (wave.pair(0), wave.pair(EXEC), wave.scc) == (0x3C, 0x30, 1)
    np.testing.assert_array_equal(np.flatnonzero(wave.active()), [4, 5])
    wave = execute("s_or_saveexec_b64 s[0:1], s[2:3]", scalars={2: 0xF0, 3: 0}, active=0x3C)
    assert wave.pair(EXEC) == 0xFC


@pytest.mark.parametrize(
    ("branch", "taken"),
    [
        ("s_cmp_eq_u32 s0, 1\ns_cbranch_scc1 .LBB0_1", True),
        ("s_cmp_eq_u32 s0, 1\ns_cbranch_scc0 .LBB0_1", False),
        ("s_mov_b64 vcc, 0\ns_cbranch_vccz .LBB0_1", True),
        ("s_mov_b64 vcc, 0\ns_cbranch_vccnz .LBB0_1", False),
        ("s_cbranch_execz .LBB0_1", False),
        ("s_cbranch_execnz .LBB0_1", True),
        ("s_branch .LBB0_1", True),
    ],
)
def test_branches(branch: str, taken: bool) -> None:
    wave = execute(f"s_mov_b32 s5, 1\n{branch}\ns_mov_b32 s5, 2\n.LBB0_1:", scalars={0: 1})
    assert wave.scalars[5] == (1 if taken else 2)


def test_undefined_bits_decide_no_branch() -> None:
    with pytest.raises(UndefinedError, match=r"line \d+: undefined bits of scc decide a branch"):
        execute("s_cmp_eq_u32 s7, 1\ns_cbranch_scc1 .LBB0_1\n.LBB0_1:")
    # a defined 0 settles a lane, whatever the other operand
    wave = execute(
        "s_and_b64 vcc, s[2:3], s[6:7]\ns_cbranch_vccz .LBB0_1\ns_mov_b32 s0, 1\n.LBB0_1:", scalars={2: 0, 3: 0}
    )
    assert wave.pair(VCC) == 0
    assert wave.scalars[0] == 0


def test_a_wave_that_does_not_end() -> None:
    with pytest.raises(ExecutionError, match="does not end"):
        execute(".LBB0_1:\ns_branch .LBB0_1")
