"""Resources, occupancy and instructions of AMD assembly, on a made-up kernel."""

from __future__ import annotations

import pytest

from epfuse.aot.amdgcn import AMDGCN, Resources, occupancy, register_waves, resources_of
from epfuse.target import Target

KERNEL = """
gate_up_kernel:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	global_load_dword v9, v[2:3], off
.LBB0_1:
	buffer_load_dwordx4 v[30:33], v25, s[8:11], 0 offen
	s_cbranch_scc1 .LBB0_1
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	s_waitcnt lgkmcnt(0)
	s_barrier
	global_load_dwordx4 v[70:73], v[46:47], off
	global_load_dwordx2 v[74:75], v[46:47], off
	global_load_ubyte v76, v[46:47], off
	v_lshl_add_u64 v[46:47], v[10:11], 0, v[6:7]
	v_mfma_f32_16x16x16_bf16 v[2:5], v[46:47], v[30:31], v[2:5]
	v_mfma_f32_16x16x16_bf16 v[2:5], v[48:49], v[34:35], v[2:5]
	s_cbranch_scc1 .LBB0_2
; %bb.3:
	global_atomic_add_f32 v[0:1], v2, off
	scratch_store_dword off, v1, off offset:4
	global_store_dwordx2 v[0:1], v[2:3], off
	s_endpgm
	.amdhsa_accum_offset 104
  - .agpr_count:    8
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 12
    .sgpr_count:     38
    .sgpr_spill_count: 0
    .vgpr_count:     112
    .vgpr_spill_count: 3
"""


def resources(
    vgprs: int = 64, agprs: int = 0, sgprs: int = 40, lds_bytes: int = 0, waves: int = 4, scratch_bytes: int = 0
) -> Resources:
    return Resources(vgprs, agprs, sgprs, 0, 0, scratch_bytes, lds_bytes, waves)


def test_resources() -> None:
    assert resources_of(KERNEL, lds_bytes=20480, waves=4) == Resources(104, 8, 38, 3, 0, 12, 20480, 4)


def test_the_main_loop_is_the_one_that_multiplies() -> None:
    lines = KERNEL.splitlines()
    loop = AMDGCN.counts(AMDGCN.main_loop(lines))
    assert dict(loop.matrix) == {"v_mfma_f32_16x16x16_bf16": 2}
    assert loop.matrix_macs == 2 * 16**3
    assert dict(loop.load_widths) == {16: 1, 8: 1, 1: 1}
    assert (loop.waits, loop.barriers, loop.vector) == (1, 1, 1)
    whole = AMDGCN.counts(lines)
    assert dict(whole.load_widths) == {16: 2, 8: 1, 4: 1, 1: 1}
    assert dict(whole.store_widths) == {8: 1}
    assert dict(whole.atomics) == {"global_atomic_add_f32": 1}
    assert whole.private == 1


def test_no_loop() -> None:
    assert AMDGCN.main_loop(["\ts_endpgm"]) == []


@pytest.mark.parametrize(
    ("vgprs", "agprs", "sgprs", "waves"),
    [
        (64, 0, 40, 8),
        (65, 0, 40, 7),  # 72
        (128, 0, 40, 4),
        (129, 0, 40, 3),  # 136
        (256, 0, 40, 2),
        (104, 8, 40, 4),  # one file: 112
        (101, 28, 40, 3),  # AGPRs begin at 104: 132
        (256, 256, 40, 1),
        (24, 0, 102, 7),  # 800 scalar registers
    ],
)
def test_waves_that_fit_the_registers(vgprs: int, agprs: int, sgprs: int, waves: int) -> None:
    assert register_waves(resources(vgprs, agprs, sgprs)) == waves


@pytest.mark.parametrize(
    ("lds_bytes", "waves", "target", "workgroups", "limits"),
    [
        (20480, 4, Target.GFX942, 3, ("lds",)),
        (36864, 4, Target.GFX942, 1, ("lds",)),
        (36864, 4, Target.GFX950, 4, ("lds",)),
        (0, 4, Target.GFX942, 8, ("registers", "waves")),
        (0, 8, Target.GFX942, 4, ("registers", "waves")),
        (0, 2, Target.GFX942, 16, ("registers", "waves")),
        (512, 1, Target.GFX942, 32, ("registers", "waves")),
    ],
)
def test_workgroups_of_a_compute_unit(
    lds_bytes: int, waves: int, target: Target, workgroups: int, limits: tuple[str, ...]
) -> None:
    seen = occupancy(resources(lds_bytes=lds_bytes, waves=waves), target)
    assert (seen.workgroups_per_cu, seen.limits) == (workgroups, limits)
    assert seen.waves_per_simd == workgroups * waves / 4
