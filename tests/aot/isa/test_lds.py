"""LDS instructions: bytes by hand, lanes by hand, and races between waves."""

import numpy as np
import pytest

from epfuse.aot.isa.errors import AccessError, HazardError, UndefinedError
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.run import launch
from tests.aot.isa.assembly import execute, is_undefined, program, vector

LANE = np.arange(64, dtype=np.uint32)
DATA = np.random.default_rng(0).integers(0, 256, 65536, np.uint8)


def words(places: np.ndarray) -> np.ndarray:
    return DATA[places[:, None] + np.arange(4)].reshape(-1).view(np.uint32)


@pytest.mark.parametrize(
    ("line", "places"),
    [
        ("ds_read_b32 v0, v9 offset:8", [8]),
        ("ds_read_b64 v[0:1], v9 offset:16", [16, 20]),
        ("ds_read_b96 v[0:2], v9", [0, 4, 8]),
        ("ds_read_b128 v[0:3], v9 offset:1024", [1024, 1028, 1032, 1036]),
        ("ds_read2_b32 v[0:1], v9 offset0:1 offset1:3", [4, 12]),
        ("ds_read2_b64 v[0:3], v9 offset1:2", [0, 4, 16, 20]),
        ("ds_read2st64_b32 v[0:1], v9 offset0:1 offset1:3", [256, 768]),
        ("ds_read2st64_b64 v[0:3], v9 offset1:2", [0, 4, 1024, 1028]),
    ],
)
def test_reads(line: str, places: list[int]) -> None:
    # the address register is among the results of the widest ones
    address = (LANE * 52 % 4096).astype(np.uint32)
    wave = execute(line + "\ns_waitcnt lgkmcnt(0)", vectors={9: address}, lds=DATA.tobytes())
    for register, place in enumerate(places):
        np.testing.assert_array_equal(vector(wave, register), words(address + place))


def test_a_read_may_overwrite_its_address() -> None:
    wave = execute(
        "ds_read2_b64 v[0:3], v0 offset1:16\ns_waitcnt lgkmcnt(0)", vectors={0: LANE * 8}, lds=DATA.tobytes()
    )
    for register, place in enumerate((0, 4, 128, 132)):
        np.testing.assert_array_equal(vector(wave, register), words(LANE * 8 + place))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ds_read_u8 v0, v9 offset:3", np.uint8),
        ("ds_read_i8 v0, v9 offset:3", np.int8),
        ("ds_read_u16 v0, v9 offset:2", np.uint16),
        ("ds_read_i16 v0, v9 offset:2", np.int16),
    ],
)
def test_narrow_reads(line: str, kind: type[np.generic]) -> None:
    wave = execute(line + "\ns_waitcnt lgkmcnt(0)", vectors={9: LANE * 2}, lds=DATA.tobytes())
    size = np.dtype(kind).itemsize
    start = 3 if size == 1 else 2
    expected = DATA[(LANE * 2 + start)[:, None] + np.arange(size)].copy().view(kind)[:, 0]
    np.testing.assert_array_equal(vector(wave).view(np.int32), expected.astype(np.int32))


@pytest.mark.parametrize(
    ("line", "places", "size"),
    [
        ("ds_write_b8 v9, v1 offset:5", [5], 1),
        ("ds_write_b16 v9, v1 offset:6", [6], 2),
        ("ds_write_b32 v9, v1 offset:8", [8], 4),
        ("ds_write_b64 v9, v[1:2]", [0, 4], 4),
        ("ds_write_b128 v9, v[1:4] offset:64", [64, 68, 72, 76], 4),
        ("ds_write2_b32 v9, v1, v2 offset0:1 offset1:3", [4, 12], 4),
        ("ds_write2_b64 v9, v[1:2], v[3:4] offset1:2", [0, 4, 16, 20], 4),
        ("ds_write2st64_b32 v9, v1, v2 offset1:16", [0, 4096], 4),
        ("ds_write2st64_b64 v9, v[1:2], v[3:4] offset0:8 offset1:16", [4096, 4100, 8192, 8196], 4),
    ],
)
def test_writes(line: str, places: list[int], size: int) -> None:
    values = {row: (LANE * 0x01010107 + row * 0x1000193).astype(np.uint32) for row in range(1, 5)}
    wave = execute(line, vectors={9: LANE * 32, **values}, lds=DATA.tobytes(), active=0xFFFF0000FFFF)
    expected = DATA.copy()
    for lane in [*range(16), *range(32, 48)]:
        for row, place in enumerate(places, 1):
            raw = values[row][lane : lane + 1].view(np.uint8)[:size]
            expected[lane * 32 + place : lane * 32 + place + size] = raw
    np.testing.assert_array_equal(wave.group.data, expected)


def test_additions_of_lanes_to_one_word() -> None:
    wave = execute("ds_add_u32 v1, v2 offset:4", vectors={1: LANE % 2 * 4, 2: LANE}, lds=bytes(64))
    np.testing.assert_array_equal(wave.group.words[:4], [0, LANE[::2].sum(), LANE[1::2].sum(), 0])


def test_lanes_from_lanes() -> None:
    wait = "\ns_waitcnt lgkmcnt(0)"
    wave = execute("ds_bpermute_b32 v0, v1, v2" + wait, vectors={1: (63 - LANE) * 4, 2: LANE + 100})
    np.testing.assert_array_equal(vector(wave), 163 - LANE)
    # of a lane that is not active comes 0; addresses wrap at 64 lanes
    wave = execute("ds_bpermute_b32 v0, v1, v2" + wait, vectors={0: 7, 1: LANE * 4 + 256 + 4, 2: LANE + 100}, active=7)
    assert vector(wave)[:4].tolist() == [101, 102, 0, 7]
    wave = execute("ds_swizzle_b32 v0, v2 offset:swizzle(SWAP,16)" + wait, vectors={2: LANE})
    np.testing.assert_array_equal(vector(wave), LANE ^ 16)
    wave = execute("ds_swizzle_b32 v0, v2 offset:swizzle(QUAD_PERM,3,2,1,0)" + wait, vectors={2: LANE})
    np.testing.assert_array_equal(vector(wave), LANE ^ 3)


def test_refused() -> None:
    with pytest.raises(AccessError, match="outside the workgroup"):
        execute("ds_read_b32 v0, v1 offset:4", vectors={1: 4092})
    with pytest.raises(AccessError, match="not a multiple of 4"):
        execute("ds_read_b64 v[0:1], v1", vectors={1: 2})
    with pytest.raises(UndefinedError, match="undefined bits of v1 decide an LDS address"):
        execute("ds_read_b32 v0, v1")


def race(first: str, second: str, *, between: str = "s_barrier", seed: int = 0) -> None:
    """Wave 0 does the first, the others the second; each has its own lanes' words, shifted by a wave."""
    body = f"""
        v_lshlrev_b32_e32 v1, 2, v0
        v_mov_b32_e32 v2, v0
        v_xor_b32_e32 v3, 0x100, v1
        {first}
        {between}
        {second}
        s_waitcnt lgkmcnt(0)
    """
    launch(program(body), (1, 1, 1), 128, bytes(8), Memory(), seed, lds_bytes=1024)


def test_races() -> None:
    write, read = "ds_write_b32 v1, v2", "ds_read_b32 v4, v3"
    wait = "s_waitcnt lgkmcnt(0)\ns_barrier"
    for seed in range(2):
        race(write, read, between=wait, seed=seed)
        with pytest.raises(HazardError, match=r"that another wave has (written|read)"):
            race(write, read, between="s_waitcnt lgkmcnt(0)", seed=seed)
        # the barrier does not wait for the write
        with pytest.raises(HazardError, match=r"that another wave has (written|read)"):
            race(write, read, between="s_barrier", seed=seed)
        race("ds_write_b32 v1, v2\n" + wait + "\n" + read, "ds_write_b32 v1, v0", between=wait, seed=seed)
        with pytest.raises(HazardError, match=r"that another wave has (written|read)"):
            race(
                "ds_write_b32 v1, v2\n" + wait + "\n" + read,
                "v_mov_b32_e32 v5, 1\nds_write_b32 v1, v5",
                between="s_nop 0",
                seed=seed,
            )
        race("ds_add_u32 v1, v2", "ds_add_u32 v3, v2", between="s_nop 0", seed=seed)
        with pytest.raises(HazardError, match=r"that another wave has (added to|read)"):
            race("ds_add_u32 v1, v2", read, between="s_nop 0", seed=seed)


def test_waves_may_write_the_same_bytes() -> None:
    same = "v_and_b32_e32 v1, 0xff, v1\nv_and_b32_e32 v2, 63, v2\nds_write_b32 v1, v2"
    race(same, "s_nop 0")
    with pytest.raises(HazardError, match="written since the last barrier"):
        race("v_and_b32_e32 v1, 0xff, v1\nds_write_b32 v1, v2", "s_nop 0")


def test_undefined_bytes_stay_undefined() -> None:
    wave = execute(
        "ds_write_b8 v1, v2\ns_waitcnt lgkmcnt(0)\nds_read_b32 v0, v1\ns_waitcnt lgkmcnt(0)", vectors={1: LANE * 4}
    )
    assert is_undefined(wave, 0)
    assert set(wave.shadows[0].tolist()) == {0xFF}


ROW, CHUNK, FOUR = LANE % 16, LANE // 16, LANE // 4


@pytest.mark.parametrize(
    ("line", "address", "passes", "conflicts"),
    [
        ("ds_read_b32 v0, v9", LANE * 4, 2, 0),
        ("ds_read_b32 v0, v9", LANE * 0, 2, 0),  # one word for all
        ("ds_read_b32 v0, v9", LANE * 8, 2, 2),
        ("ds_read_b32 v0, v9", LANE * 128, 2, 62),
        ("ds_read_b64 v[0:1], v9", LANE * 8, 4, 0),
        ("ds_write_b128 v9, v[0:3]", LANE * 16, 8, 0),
        ("ds_write_b128 v9, v[0:3]", LANE // 8 * 16 + LANE % 8 * 128, 8, 56),
        ("ds_read_b128 v[0:3], v9", LANE * 16, 8, 0),
        # fours of lanes that are served together lie in other banks, unlike neighbours; then the other way round
        ("ds_read_b128 v[0:3], v9", LANE % 4 * 16 + FOUR * 128 + FOUR // 4 % 2 * 64, 8, 0),
        ("ds_read_b128 v[0:3], v9", LANE % 4 * 16 + FOUR * 128 + (FOUR ^ FOUR // 4) % 2 * 64, 8, 8),
        # an MFMA operand of 16 rows of 256 bytes: as it is, and with each row's chunks exchanged
        ("ds_read2_b64 v[0:3], v9 offset1:4", ROW * 256 + CHUNK * 8, 8, 120),
        ("ds_read_b64 v[0:1], v9", ROW * 256 + (CHUNK ^ ROW) * 8, 4, 0),
    ],
)
def test_bank_conflicts(line: str, address: np.ndarray, passes: int, conflicts: int) -> None:
    wave = execute(line + "\ns_waitcnt lgkmcnt(0)", vectors={9: address}, lds=DATA.tobytes())
    counts = wave.group.counts
    assert (counts.lds_accesses.total(), counts.lds_conflicts.total()) == (passes, conflicts)


def test_only_active_lanes_conflict() -> None:
    body = """
        s_mov_b64 exec, 0x10001
        ds_read_b32 v0, v9
        s_waitcnt lgkmcnt(0)
    """
    wave = execute(body, vectors={9: LANE * 128}, lds=DATA.tobytes())
    assert (wave.group.counts.lds_accesses.total(), wave.group.counts.lds_conflicts.total()) == (1, 1)
