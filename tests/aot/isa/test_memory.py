"""Vector memory and scalar loads: bytes by hand, ranges of descriptors, atomics, races and undefined bytes."""

import numpy as np
import pytest

from epfuse.aot.isa.errors import AccessError, ExecutionError, HazardError, UndefinedError
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.run import launch
from tests.aot.isa.assembly import execute, is_undefined, program, vector

LANE = np.arange(64, dtype=np.uint32)
DATA = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)


LOADS = (
    ("ubyte", np.uint8, 1),
    ("sbyte", np.int8, 1),
    ("ushort", np.uint16, 1),
    ("sshort", np.int16, 1),
    ("dword", np.uint32, 1),
    ("dwordx2", np.uint32, 2),
    ("dwordx3", np.uint32, 3),
    ("dwordx4", np.uint32, 4),
)
"""What a load is called after its kind of memory, and what a lane gets."""


def placed(*, defined: bool = True, records: int = 0x7FFFFFFE) -> tuple[Memory, int, dict[int, int]]:
    """A buffer of 4096 bytes, its address, and its descriptor in s[4:7]."""
    memory = Memory()
    address = memory.place(DATA, "x", defined=defined)
    return memory, address, {4: address & 0xFFFFFFFF, 5: address >> 32, 6: records, 7: 0x27000}


@pytest.mark.parametrize(("name", "kind", "count"), LOADS)
def test_buffer_loads(name: str, kind: type[np.generic], count: int) -> None:
    memory, _, scalars = placed()
    target = "v0" if count == 1 else f"v[0:{count - 1}]"
    offsets = LANE * 4 * count
    offsets[5] = 0x80000000
    line = f"buffer_load_{name} {target}, v9, s[4:7], 0 offen offset:8\ns_waitcnt vmcnt(0)"
    wave = execute(line, vectors={9: offsets}, scalars=scalars, memory=memory)
    size = np.dtype(kind).itemsize
    for lane in (0, 1, 7, 63):
        first = int(offsets[lane]) + 8
        expected = DATA[first : first + size * count].copy().view(kind).astype(np.int64)
        assert [int(vector(wave, row)[lane]) for row in range(count)] == [int(each) & 0xFFFFFFFF for each in expected]
    # out of the descriptor's range is 0
    assert [int(vector(wave, row)[5]) for row in range(count)] == [0] * count


@pytest.mark.parametrize(("name", "size"), [("byte", 1), ("short", 2), ("dword", 4), ("dwordx2", 8), ("dwordx4", 16)])
def test_buffer_stores(name: str, size: int) -> None:
    memory, address, scalars = placed(defined=False)
    source = "v0" if size <= 4 else f"v[0:{size // 4 - 1}]"
    offsets = LANE * 16
    offsets[3] = 0x80000000
    values = {row: (LANE * 0x01030507 + row).astype(np.uint32) for row in range(4)}
    execute(
        f"buffer_store_{name} {source}, v9, s[4:7], 0 offen",
        vectors={9: offsets, **values},
        scalars=scalars,
        memory=memory,
    )
    expected, written = DATA.copy(), np.zeros(4096, np.bool_)
    for lane in LANE[LANE != 3]:
        raw = np.concatenate([values[row][lane : lane + 1].view(np.uint8) for row in range(4)])[:size]
        expected[lane * 16 : lane * 16 + size] = raw
        written[lane * 16 : lane * 16 + size] = True
    np.testing.assert_array_equal(memory.read(address, 4096), expected)
    np.testing.assert_array_equal(memory.undefined_bytes(address, 4096), ~written)


def test_range_of_a_descriptor() -> None:
    memory, _, scalars = placed(records=128)
    wave = execute(
        "buffer_load_dword v0, v9, s[4:7], 0 offen\ns_waitcnt vmcnt(0)",
        vectors={9: LANE * 4},
        scalars=scalars,
        memory=memory,
    )
    np.testing.assert_array_equal(vector(wave), np.where(LANE < 32, DATA.view(np.uint32)[:64], 0))
    # a scalar offset moves the place, and counts against the range
    wave = execute(
        "buffer_load_dword v0, v9, s[4:7], s8 offen\ns_waitcnt vmcnt(0)",
        vectors={9: LANE * 4},
        scalars={**scalars, 8: 64},
        memory=memory,
    )
    np.testing.assert_array_equal(vector(wave), np.where(LANE < 16, DATA.view(np.uint32)[16:80], 0))
    with pytest.raises(AccessError, match="across the end"):
        execute("buffer_load_dwordx2 v[0:1], v9, s[4:7], 0 offen", vectors={9: 124}, scalars=scalars, memory=memory)
    # what the hardware's sum of both offsets does beyond 32 bits is not known
    with pytest.raises(AccessError, match="beyond 32 bits"):
        execute("buffer_load_dword v0, v9, s[4:7], 0 offen offset:8", vectors={9: -8}, scalars=scalars, memory=memory)
    with pytest.raises(AccessError, match="another format"):
        execute(
            "buffer_load_dword v0, v9, s[4:7], 0 offen", vectors={9: 0}, scalars={**scalars, 7: 0x24000}, memory=memory
        )
    with pytest.raises(AccessError, match="stride"):
        execute(
            "buffer_load_dword v0, v9, s[4:7], 0 offen",
            vectors={9: 0},
            scalars={**scalars, 5: scalars[5] | 4 << 16},
            memory=memory,
        )


def test_outside_every_buffer() -> None:
    memory, address, scalars = placed()
    with pytest.raises(AccessError, match=r"\+0 bytes from the end of x"):
        execute(
            "buffer_load_dword v0, v9, s[4:7], 0 offen",
            vectors={9: np.where(LANE == 9, 4096, 0)},
            scalars=scalars,
            memory=memory,
        )
    # a lane that is not active may point anywhere
    execute(
        "buffer_load_dword v0, v9, s[4:7], 0 offen",
        vectors={9: np.where(LANE == 9, 4096, 0)},
        scalars=scalars,
        memory=memory,
        active=1,
    )
    with pytest.raises(AccessError, match="not a multiple of 4"):
        execute("buffer_load_dword v0, v9, s[4:7], 0 offen", vectors={9: 2}, scalars=scalars, memory=memory)
    with pytest.raises(AccessError, match="in no buffer"):
        execute("s_load_dword s0, s[4:5], 0x0", scalars={4: 64, 5: 0}, memory=memory)
    assert address % 16 == 0
    assert address % 32 == 16


def test_global_addresses() -> None:
    memory, address, _ = placed()
    vectors = {2: (address + LANE.astype(np.int64) * 16) & 0xFFFFFFFF, 3: address >> 32}
    wave = execute(
        "global_load_dwordx4 v[4:7], v[2:3], off offset:16\ns_waitcnt vmcnt(0)", vectors=vectors, memory=memory
    )
    expected = DATA[16 : 16 + 1024].view(np.uint32).reshape(64, 4)
    for row in range(4):
        np.testing.assert_array_equal(vector(wave, 4 + row), expected[:, row])
    scalars = {8: address & 0xFFFFFFFF, 9: address >> 32}
    execute("global_store_dword v1, v2, s[8:9]", vectors={1: LANE * 8, 2: LANE}, scalars=scalars, memory=memory)
    np.testing.assert_array_equal(memory.read(address, 512).view(np.uint32)[::2], LANE)


@pytest.mark.parametrize(("name", "kind", "count"), LOADS[:-1])  # 12 bytes a lane: the widest is tested above
def test_global_loads(name: str, kind: type[np.generic], count: int) -> None:
    """From a scalar address, an unsigned offset a lane, and a signed one of the instruction."""
    memory, address, _ = placed()
    target = "v0" if count == 1 else f"v[0:{count - 1}]"
    scalars, offsets = {8: address & 0xFFFFFFFF, 9: address >> 32}, LANE * 12 + 8
    line = f"global_load_{name} {target}, v9, s[8:9] offset:-8\ns_waitcnt vmcnt(0)"
    wave = execute(line, vectors={9: offsets}, scalars=scalars, memory=memory)
    size = np.dtype(kind).itemsize * count
    for lane in (0, 1, 7, 63):
        expected = DATA[lane * 12 : lane * 12 + size].copy().view(kind).astype(np.int64)
        assert [int(vector(wave, row)[lane]) for row in range(count)] == [int(each) & 0xFFFFFFFF for each in expected]


@pytest.mark.parametrize(
    ("name", "size"), [("byte", 1), ("short", 2), ("dwordx2", 8), ("dwordx3", 12), ("dwordx4", 16)]
)
def test_global_stores(name: str, size: int) -> None:
    memory, address, _ = placed()
    source = "v0" if size <= 4 else f"v[0:{size // 4 - 1}]"
    values = {row: (LANE * 0x01030507 + row).astype(np.uint32) for row in range(4)}
    vectors = {10: (address + LANE.astype(np.int64) * 16) & 0xFFFFFFFF, 11: address >> 32, **values}
    execute(f"global_store_{name} v[10:11], {source}, off offset:16", vectors=vectors, memory=memory, active=0xFFFF)
    expected = DATA.copy()
    for lane in range(16):
        raw = np.concatenate([values[row][lane : lane + 1].view(np.uint8) for row in range(4)])[:size]
        expected[lane * 16 + 16 : lane * 16 + 16 + size] = raw
    np.testing.assert_array_equal(memory.read(address, 4096), expected)


def test_atomic_additions() -> None:
    memory = Memory()
    address = memory.place(np.ones(4, np.float32), "x")
    scalars = {4: address & 0xFFFFFFFF, 5: address >> 32, 6: 16, 7: 0x27000}
    vectors = {1: LANE.astype(np.float32), 2: np.where(LANE < 32, 4, 64)}
    execute("buffer_atomic_add_f32 v1, v2, s[4:7], 0 offen", vectors=vectors, scalars=scalars, memory=memory)
    np.testing.assert_array_equal(memory.read(address, 16).view(np.float32), [1, 1 + LANE[:32].sum(), 1, 1])


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_scalar_loads(count: int) -> None:
    memory, address, _ = placed()
    scalars = {30: address & 0xFFFFFFFF, 31: address >> 32}
    target = "s8" if count == 1 else f"s[8:{7 + count}]"
    suffix = "" if count == 1 else f"x{count}"
    wave = execute(
        f"s_load_dword{suffix} {target}, s[30:31], 0x24\ns_waitcnt lgkmcnt(0)", scalars=scalars, memory=memory
    )
    assert wave.scalars[8 : 8 + count] == DATA.view(np.uint32)[9 : 9 + count].tolist()


def test_undefined_bytes() -> None:
    memory, _, scalars = placed(defined=False)
    load = "buffer_load_dword v0, v9, s[4:7], 0 offen\ns_waitcnt vmcnt(0)"
    assert is_undefined(execute(load, vectors={9: LANE * 4}, scalars=scalars, memory=memory), 0)
    with pytest.raises(UndefinedError, match="v0 decide an address"):
        execute(
            f"{load}\nbuffer_load_dword v1, v0, s[4:7], 0 offen", vectors={9: LANE * 4}, scalars=scalars, memory=memory
        )


STORE = """
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    s_waitcnt lgkmcnt(0)
    v_lshlrev_b32_e32 v1, 2, v0
    v_xor_b32_e32 v2, 0x100, v1
    global_store_dword v1, v0, s[4:5]
    {between}
    global_load_dword v3, v2, s[4:5]
    s_waitcnt vmcnt(0)
"""


def store_and_load(between: str) -> None:
    memory = Memory()
    address = memory.place(np.zeros(128, np.uint32), "x")
    body = STORE.format(between=between)
    launch(program(body), (1, 1, 1), 128, address.to_bytes(8, "little"), memory, 0, lds_bytes=0)


def test_stores_are_seen_after_their_wait_and_a_barrier() -> None:
    store_and_load("s_waitcnt vmcnt(0)\ns_barrier")
    for between in ("s_barrier", "s_waitcnt vmcnt(0)", "s_nop 0"):
        with pytest.raises(HazardError, match=r"x at byte .*, which another wave has written"):
            store_and_load(between)


def test_workgroups_must_leave_each_others_bytes_alone() -> None:
    memory = Memory()
    address = memory.place(np.zeros(64, np.uint32), "x")
    body = """
        s_load_dwordx2 s[4:5], s[0:1], 0x0
        s_waitcnt lgkmcnt(0)
        v_lshlrev_b32_e32 v1, 2, v0
        v_mov_b32_e32 v2, {value}
        global_store_dword v1, v2, s[4:5]
    """
    kernarg = address.to_bytes(8, "little")
    launch(program(body.format(value="7")), (3, 1, 1), 64, kernarg, memory, 0, lds_bytes=0)
    with pytest.raises(HazardError, match="which another wave has written"):
        launch(program(body.format(value="s2")), (3, 1, 1), 64, kernarg, memory, 0, lds_bytes=0)


def test_launches_that_cannot_be() -> None:
    kernel = program("s_nop 0")
    with pytest.raises(ExecutionError, match="threads is 96"):
        launch(kernel, (1, 1, 1), 96, bytes(8), Memory(), 0, lds_bytes=0)
    with pytest.raises(ExecutionError, match="kernarg has 4 bytes"):
        launch(kernel, (1, 1, 1), 64, bytes(4), Memory(), 0, lds_bytes=0)
    with pytest.raises(ExecutionError, match="along y"):
        launch(kernel, (1, 2, 1), 64, bytes(8), Memory(), 0, lds_bytes=0)
    split = program("v_readfirstlane_b32 s4, v0\ns_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .LBB0_1\ns_barrier\n.LBB0_1:")
    with pytest.raises(ExecutionError, match="wait at a barrier and others have ended"):
        launch(split, (1, 1, 1), 128, bytes(8), Memory(), 0, lds_bytes=0)


def test_counts() -> None:
    memory, address, _ = placed()
    body = """
        s_load_dwordx2 s[4:5], s[0:1], 0x0
        s_waitcnt lgkmcnt(0)
        v_lshlrev_b32_e32 v1, 4, v0
        v_mov_b32_e32 v2, 0
        v_mov_b32_e32 v4, s4
        v_mov_b32_e32 v5, s5
        global_load_dwordx4 v[8:11], v[4:5], off
        global_store_dword v1, v2, s[4:5]
        ds_write_b32 v1, v2
        s_barrier
    """
    counts = launch(program(body), (1, 1, 1), 64, address.to_bytes(8, "little"), memory, 0, lds_bytes=1024)
    assert counts.instructions["v_mov_b32"] == 3
    assert counts.loaded == {"kernarg": 8, "x": 1024}
    assert counts.lines_loaded == {"x": 1}
    assert (counts.stored["x"], counts.lines_stored["x"]) == (256, 9)
    # a stride of 16 bytes: 32 lanes share 8 banks
    assert (counts.lds_accesses["ds_write_b32"], counts.lds_conflicts["ds_write_b32"]) == (2, 6)
    assert counts.barriers == 1
    assert counts.waits == {"lgkmcnt": 1, "vmcnt": 0}
    assert counts.reached == set(range(11))
