"""Small programs around a few instructions, and waves that execute them."""

from __future__ import annotations

import numpy as np

from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.hazards import Outstanding, Recent
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.program import Program, parse
from epfuse.aot.isa.registers import EXEC, VECTORS
from epfuse.aot.isa.run import decode, run_wave
from epfuse.aot.isa.wave import Wave
from epfuse.aot.isa.workgroup import Workgroup

FRAME = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	.text
kernel:
{body}
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel kernel
		.amdhsa_user_sgpr_count 2
		.amdhsa_user_sgpr_dispatch_ptr 0
		.amdhsa_user_sgpr_queue_ptr 0
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_dispatch_id 0
		.amdhsa_user_sgpr_kernarg_preload_length 0
		.amdhsa_user_sgpr_kernarg_preload_offset 0
		.amdhsa_user_sgpr_private_segment_size 0
		.amdhsa_uses_dynamic_stack 0
		.amdhsa_enable_private_segment 0
		.amdhsa_private_segment_fixed_size 0
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y 0
		.amdhsa_system_sgpr_workgroup_id_z 0
		.amdhsa_system_sgpr_workgroup_info 0
		.amdhsa_system_vgpr_workitem_id 0
		.amdhsa_next_free_vgpr 64
		.amdhsa_next_free_sgpr 32
		.amdhsa_accum_offset 64
		.amdhsa_float_round_mode_32 0
		.amdhsa_float_round_mode_16_64 0
		.amdhsa_float_denorm_mode_32 3
		.amdhsa_float_denorm_mode_16_64 3
		.amdhsa_dx10_clamp 1
		.amdhsa_ieee_mode 1
		.amdhsa_fp16_overflow 0
		.amdhsa_tg_split 0
	.end_amdhsa_kernel
	.text
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .address_space:  global
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
    .group_segment_fixed_size: 0
    .kernarg_segment_align: 8
    .kernarg_segment_size: 8
    .max_flat_workgroup_size: 256
    .name:           kernel
    .private_segment_fixed_size: 0
    .sgpr_count:     38
    .vgpr_count:     64
    .wavefront_size: 64
...
	.end_amdgpu_metadata
"""


def program(body: str) -> Program:
    """A kernel of one pointer around instructions."""
    lines = [line.strip() for line in body.strip().splitlines()]
    return parse(FRAME.format(body="\n".join(line if line.endswith(":") else f"\t{line}" for line in lines)))


def execute(
    body: str,
    vectors: dict[int, object] | None = None,
    scalars: dict[int, int] | None = None,
    active: int = (1 << 64) - 1,
    memory: Memory | None = None,
    lds: bytes = bytes(4096),
) -> Wave:
    """Run instructions to the end on one wave.

    Args:
        body: the instructions.
        vectors: first register -> uint32 or float32 values of the lanes, or one for all lanes.
        scalars: register -> its 32 bits.
        active: the lanes that are.
        memory: of the device.
        lds: what LDS holds.
    """
    group = Workgroup(0, len(lds), memory or Memory(), LaunchCounts())
    group.data[: len(lds)] = np.frombuffer(lds, np.uint8)
    group.undefined[:] = 0
    group.memory.begin()
    wave = Wave(0, group, Outstanding(), Recent())
    for row, value in (vectors or {}).items():
        lanes = np.broadcast_to(np.asarray(value), (64,)).copy()
        wave.rows[row][...] = lanes.view(np.uint32) if lanes.dtype == np.float32 else lanes.astype(np.uint32)
        wave.shade(row, 0)
    for number, value in (scalars or {}).items():
        wave.scalars[number] = value
        wave.define_scalar(number)
    wave.set_pair(EXEC, active)
    steps = decode(program(body))
    with np.errstate(all="ignore"):
        run_wave(wave, steps, ([0] * len(steps), [0] * len(steps)), {wave: 1000})
    return wave


def vector(wave: Wave, row: int = 0) -> np.ndarray:
    """The bits of a vector register."""
    return wave.rows[row]


def floats(wave: Wave, row: int = 0) -> np.ndarray:
    """A vector register as floats."""
    return wave.rows[row].view(np.float32)


def is_undefined(wave: Wave, row: int) -> bool:
    """Whether a vector register has a bit that nothing defined."""
    return bool(wave.undefined >> (row + VECTORS) & 1)
