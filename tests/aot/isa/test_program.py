"""The parser refuses what it does not know."""

import pytest

from epfuse.aot.isa.errors import UnknownInstruction
from epfuse.aot.isa.program import Argument, Constant, parse
from epfuse.aot.isa.registers import VCC, VECTORS, Register
from epfuse.aot.isa.run import decode
from tests.aot.isa.assembly import FRAME, execute, program


def test_reads_operands_and_modifiers() -> None:
    found = program(
        """
        v_fma_f32 v1, -s4, |v3|, 0.5 ; a comment
        buffer_load_dword v9, v2, s[8:11], 0 offen offset:128
        s_waitcnt vmcnt(1)
        """
    )
    first, load, wait, end = found.instructions
    assert first.operands == (
        Register(VECTORS + 1),
        Register(4, negate=True),
        Register(VECTORS + 3, absolute=True),
        Constant(0.5),
    )
    assert load.operands[2] == Register(8, 4)
    assert load.modifiers == {"offen": True, "offset": 128}
    assert wait.modifiers == {"vmcnt": 1}
    assert end.opcode == "s_endpgm"
    assert first.line == 5
    assert found.arguments == (Argument(0, 8, "global_buffer"),)
    assert (found.kernarg_bytes, found.threads) == (8, 256)


@pytest.mark.parametrize(
    "line",
    [
        "v_mov_b32_e32 v256, v0",
        "v_mov_b32_e32 v[3:2], v0",
        "v_mov_b32_e32 v0, 3.0",
        "v_mov_b32_e32 v0, lit(3)",
        "v_mov_b32_e32 v0, v1 offset:x",
        "buffer_load_dword v0, v1, s[4:7], 0 offen offen",
        "V_MOV v0, v1",
        ".long 0xbf800000",
    ],
)
def test_refuses_text(line: str) -> None:
    with pytest.raises(UnknownInstruction, match="line 5"):
        program(line)


@pytest.mark.parametrize(
    "line",
    [
        "v_frobnicate_b32 v0, v1",
        "s_sleep 1",
        "s_waitcnt_depctr 0",
        "s_nop 16",
        "s_waitcnt vmcnt(64)",
        "s_waitcnt vscnt(0)",
        "v_mov_b32_e32 v0, v1 clamp",
        "v_mov_b32_e32 v0, v1, v2",
        "v_mov_b32_e32 v0, a1",
        "v_add_u32_e32 v0, -v1, v2",
        "v_add_f32_e64 v0, v1, v2 mul:2",
        "v_cmp_lt_f32_e32 s[0:1], v1, v2",
        "v_cmp_tru_f32_e64 s[0:1], v1, v2",
        "v_cmpx_lt_f32_e32 vcc, v1, v2",
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3] cbsz:1",
        "v_mfma_f32_16x16x32_bf8_fp8 v[0:3], v[4:5], v[6:7], v[0:3]",
        "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:7], v[6:7], v[0:3]",
        "v_pk_mul_f32 v[0:1], v[2:3], v[4:5] neg_lo:[1]",
        "v_pk_mul_f32 v[0:1], v[2:3], 1.0 op_sel_hi:[1,0] neg_lo:[0,1]",
        "v_pk_mul_f32 v[0:1], v[2:3], v[4:5] clamp",
        "v_pk_mul_f32 v[0:1], v[2:3], 1.0",
        "v_and_b32_sdwa v0, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PRESERVE src0_sel:BYTE_7 src1_sel:DWORD",
        "v_or_b32_sdwa v0, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD src1_sel:DWORD",
        "v_mov_b32_dpp v0, v1 row_newbcast:3 row_mask:0xf bank_mask:0xf",
        "v_mov_b32_dpp v0, v1 quad_perm:[0,1,2,4] row_mask:0xf bank_mask:0xf",
        "v_mov_b32_dpp v0, v1 row_shr:1 row_mask:0x1f bank_mask:0xf",
        "buffer_load_dword v0, v1, s[4:7], 0 idxen",
        "buffer_load_dword v0, v1, s[4:7], 0 offen lds",
        "buffer_load_dwordx4 v[0:2], v1, s[4:7], 0 offen",
        "buffer_atomic_add_f32 v0, v1, s[4:7], 0 offen sc0",
        "buffer_load_dword v0, v1, s[4:7], 0 offen offset:4096",
        "global_load_dword v0, v1, off",
        "flat_load_dword v0, v[2:3]",
        "scratch_load_dword v0, off, s0",
        "s_load_dwordx3 s[0:2], s[4:5], 0x0",
        "ds_read_b32 v0, v1 offset:65536",
        "ds_read_b32 v0, v1 gds",
        "ds_swizzle_b32 v0, v1 offset:swizzle(REVERSE,4)",
        "ds_add_rtn_u32 v0, v1, v2",
        "s_branch .LBB0_9",
        "s_cbranch_cdbgsys .LBB0_9",
        "s_movk_i32 s0, 0x10000",
        "v_readlane_b32 s0, v1, s2",
    ],
)
def test_refuses_instructions(line: str) -> None:
    with pytest.raises(UnknownInstruction, match="line 5"):
        decode(program(line))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("gfx942", "gfx950", "amdgcn_target"),
        ("float_denorm_mode_32 3", "float_denorm_mode_32 0", "float_denorm_mode_32"),
        ("enable_private_segment 0", "enable_private_segment 1", "enable_private_segment"),
    ],
)
def test_refuses_modes(old: str, new: str, why: str) -> None:
    from epfuse.aot.isa.memory import Memory
    from epfuse.aot.isa.run import launch

    text = FRAME.format(body="\ts_nop 0").replace(old, new)
    with pytest.raises(UnknownInstruction, match=why):
        launch(parse(text), (1, 1, 1), 64, bytes(8), Memory(), 0, lds_bytes=0)


def test_without_an_instruction() -> None:
    found = program("s_mov_b32 s0, 3\ns_mov_b32 s0, 5").without(1)
    assert found.instructions[1].opcode == "s_nop"
    assert len(found.instructions) == 3
    assert execute("s_mov_b32 s0, vcc_lo", scalars={VCC: 7}).scalars[0] == 7
