"""Missing waits are errors: counters by hand from AMD's rules, wait states with one state too few."""

import numpy as np
import pytest

from epfuse.aot.isa.errors import HazardError
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.run import decode, launch
from tests.aot.isa.assembly import execute, program

LANE = np.arange(64, dtype=np.uint32)
MEMORY = Memory()
ADDRESS = MEMORY.place(np.zeros(1024, np.uint32), "x")
SCALARS = {4: ADDRESS & 0xFFFFFFFF, 5: ADDRESS >> 32, 6: 4096, 7: 0x27000, 8: ADDRESS & 0xFFFFFFFF, 9: ADDRESS >> 32}
VECTORS = dict.fromkeys(range(9, 24), 0)
LOAD = "buffer_load_dword v{}, v9, s[4:7], 0 offen\n"
STORE = "buffer_store_dword v{}, v9, s[4:7], 0 offen\n"
READ = "ds_read_b32 v{}, v9\n"
SCALAR = "s_load_dword s{}, s[8:9], 0x0\n"


def run(body: str) -> None:
    execute(body, vectors=VECTORS, scalars=SCALARS, memory=MEMORY)


COVERED = [
    LOAD.format(0) + "s_waitcnt vmcnt(0)\nv_mov_b32_e32 v1, v0",
    # in order: of three, one may be left when the second is needed
    LOAD.format(0) + LOAD.format(1) + LOAD.format(2) + "s_waitcnt vmcnt(1)\nv_add_u32_e32 v3, v0, v1",
    # stores count too
    LOAD.format(0) + STORE.format(10) + "s_waitcnt vmcnt(1)\nv_mov_b32_e32 v1, v0",
    READ.format(0) + READ.format(1) + "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v0",
    READ.format(0) + "ds_write_b32 v9, v10\ns_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v0",
    SCALAR.format(0) + "s_waitcnt lgkmcnt(0)\ns_mov_b32 s2, s0",
    # a scalar load may be the one that is left
    SCALAR.format(0) + READ.format(0) + READ.format(1) + "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v0",
    "ds_bpermute_b32 v0, v9, v10\ns_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v2, v0",
    # what is stored is read when the store is issued
    STORE.format(10) + "v_mov_b32_e32 v10, 1",
    LOAD.format(0) + READ.format(1) + "s_waitcnt vmcnt(0) lgkmcnt(0)\nv_add_u32_e32 v3, v0, v1",
]
MISSING = [
    (LOAD.format(0) + "v_mov_b32_e32 v1, v0", "vmcnt"),
    (LOAD.format(0) + "v_mov_b32_e32 v0, 1", "vmcnt"),
    (LOAD.format(0) + LOAD.format(0), "vmcnt"),
    (LOAD.format(0) + STORE.format(0), "vmcnt"),
    (LOAD.format(0) + "s_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v1, v0", "vmcnt"),
    (LOAD.format(0) + LOAD.format(1) + LOAD.format(2) + "s_waitcnt vmcnt(2)\nv_mov_b32_e32 v3, v1", "vmcnt"),
    (LOAD.format(0) + STORE.format(10) + "s_waitcnt vmcnt(2)\nv_mov_b32_e32 v1, v0", "vmcnt"),
    ("global_load_dword v0, v9, s[8:9]\nv_mov_b32_e32 v1, v0", "vmcnt"),
    (READ.format(0) + "v_mov_b32_e32 v2, v0", "lgkmcnt"),
    (READ.format(0) + READ.format(1) + "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v1", "lgkmcnt"),
    (SCALAR.format(0) + "s_mov_b32 s2, s0", "lgkmcnt"),
    # scalar loads return in any order
    (SCALAR.format(0) + SCALAR.format(1) + "s_waitcnt lgkmcnt(1)\ns_mov_b32 s2, s0", "lgkmcnt"),
    (SCALAR.format(0) + READ.format(0) + "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v0", "lgkmcnt"),
    (SCALAR.format(0) + READ.format(0) + READ.format(1) + "s_waitcnt lgkmcnt(1)\ns_mov_b32 s2, s0", "lgkmcnt"),
    ("ds_bpermute_b32 v0, v9, v10\nv_mov_b32_e32 v2, v0", "lgkmcnt"),
    ("ds_swizzle_b32 v0, v10 offset:swizzle(SWAP,16)\nv_mov_b32_e32 v2, v0", "lgkmcnt"),
]


@pytest.mark.parametrize("body", COVERED)
def test_covered(body: str) -> None:
    run(body)


@pytest.mark.parametrize(("body", "counter"), MISSING)
def test_missing(body: str, counter: str) -> None:
    with pytest.raises(HazardError, match=rf"line \d+: .* line \d+ loads and no wait on {counter} covers"):
        run(body)


STATES = [
    # what a vector instruction writes to a scalar register
    ("v_cmp_lt_u32_e64 s[0:1], v10, v11", "v_cndmask_b32_e64 v0, v10, v11, s[0:1]", 2),
    ("v_cmp_lt_u32_e32 vcc, v10, v11", "v_cndmask_b32_e32 v0, v10, v11, vcc", 2),
    ("v_readfirstlane_b32 s0, v10", "v_mov_b32_e32 v0, s0", 2),
    ("v_readfirstlane_b32 s4, v10", "buffer_load_dword v0, v9, s[4:7], 0 offen", 5),
    ("v_cmp_lt_u32_e32 vcc, v10, v11", "v_div_fmas_f32 v0, v10, v11, v12", 4),
    # and to a vector register
    ("v_mov_b32_e32 v10, 0", "v_mov_b32_dpp v0, v10 row_shr:1 row_mask:0xf bank_mask:0xf", 2),
    ("v_mov_b32_e32 v10, 0", "v_readfirstlane_b32 s0, v10", 1),
    ("v_mov_b32_e32 v10, 0", "v_readlane_b32 s0, v10, 3", 1),
    ("v_mov_b32_e32 v10, 0", "v_mfma_f32_16x16x4_f32 v[0:3], v10, v11, 0", 2),
    ("v_mov_b32_e32 v10, 0", "v_mfma_f32_16x16x4_f32 v[0:3], v14, v15, v[10:13]", 2),
    ("v_rcp_f32_e32 v0, v10", "v_mul_f32_e32 v1, v0, v10", 1),
    ("v_exp_f32_e32 v0, v10", "v_mul_f32_e32 v1, v0, v10", 1),
    (
        "v_or_b32_sdwa v0, v10, v11 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:DWORD",
        "v_mov_b32_e32 v1, v0",
        1,
    ),
    # data of a store of more than 8 bytes
    ("buffer_store_dwordx4 v[10:13], v9, s[4:7], 0 offen", "v_mov_b32_e32 v11, 1", 2),
    ("v_mov_b32_e32 v10, 0", "v_add_u32_e32 v0, v10, v10", 0),
    ("v_rcp_f32_e32 v0, v10", "v_rcp_f32_e32 v1, v0", 0),
    ("buffer_store_dwordx2 v[10:11], v9, s[4:7], 0 offen", "v_mov_b32_e32 v11, 1", 0),
    ("s_mov_b64 vcc, 0", "v_cndmask_b32_e32 v0, v10, v11, vcc", 0),
]


@pytest.mark.parametrize(("first", "second", "states"), STATES)
def test_wait_states(first: str, second: str, states: int) -> None:
    scalar = "v_mov_b32_e32 v10, s4\ns_nop 7\n" if "readfirstlane_b32 s4" in first else ""

    def body(nop: int) -> str:
        pause = f"s_nop {nop - 1}\n" if nop else ""
        return f"{scalar}{first}\n{pause}{second}"

    run(body(states))
    if states:
        with pytest.raises(HazardError, match=f"comes {states - 1} wait states after line"):
            run(body(states - 1))


def test_launches_agree_in_every_order() -> None:
    body = """
        s_load_dwordx2 s[4:5], s[0:1], 0x0
        v_lshlrev_b32_e32 v1, 2, v0
        v_xor_b32_e32 v2, 0xfc, v1
        v_mov_b32_e32 v3, s2
        v_lshl_add_u32 v3, v3, 8, v0
        ds_write_b32 v1, v3
        s_waitcnt lgkmcnt(0)
        s_barrier
        v_xor_b32_e32 v2, 0x300, v2
        ds_read_b32 v4, v2
        v_mov_b32_e32 v5, s2
        v_lshl_add_u32 v5, v5, 10, v1
        s_waitcnt lgkmcnt(0)
        global_store_dword v5, v4, s[4:5]
    """
    results = []
    for seed in range(4):
        memory = Memory()
        address = memory.place(np.zeros(3 * 256, np.uint32), "out", defined=False)
        launch(program(body), (3, 1, 1), 256, address.to_bytes(8, "little"), memory, seed, lds_bytes=1024)
        results.append(memory.read(address, 3 * 1024).view(np.uint32))
        assert not memory.undefined_bytes(address, 3 * 1024).any()
    thread = np.arange(256)
    np.testing.assert_array_equal(
        results[0], np.concatenate([256 * group + (thread ^ 0x3F ^ 0xC0) for group in range(3)])
    )
    assert all((each == results[0]).all() for each in results)


def test_every_wait_of_a_program_matters() -> None:
    body = READ.format(0) + "s_waitcnt lgkmcnt(0)\n" + LOAD.format(1) + "s_waitcnt vmcnt(0)\nv_add_u32_e32 v2, v0, v1"
    found = program(body)
    waits = [place for place, each in enumerate(found.instructions) if each.opcode == "s_waitcnt"]
    assert len(decode(found)) == 6
    for place in waits:
        lines = body.splitlines()
        lines[place] = "s_nop 0"
        with pytest.raises(HazardError):
            run("\n".join(lines))
