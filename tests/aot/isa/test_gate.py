"""Which cases the gate has: no machine code that a call can launch is left out; what CI draws has every way."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from epfuse.aot.isa import gate
from epfuse.aot.isa.cases import BudgetCase, Combining, LayerCase, RoutingCase
from epfuse.aot.isa.inject import KINDS, kinds_of, share, subjects
from epfuse.aot.isa.program import parse
from epfuse.aot.launches import Launch
from epfuse.aot.tasks import start
from epfuse.config import Bias, Combine, Path, SwiGLUOAI


def launched() -> tuple[set[Launch], set[Launch]]:
    """What the gate's cases launch, and what `epfuse aot` lists, for gfx942; nothing is compiled."""
    from epfuse.aot.calls import calls
    from epfuse.aot.launches import launches_of
    from epfuse.api import fused_experts
    from epfuse.stages.combine.launch import launch_combine
    from epfuse.stages.route.launch import launch_route
    from epfuse.stages.route.table import RouteTable
    from epfuse.target import Target
    from epfuse.weights.experts import ExpertWeights

    meta, found = torch.device("meta"), set()
    cases = gate.every_case(0)
    for layer in (case for case in cases if isinstance(case, LayerCase)):
        exact = layer.exact

        def call(exact=exact) -> None:  # type: ignore[no-untyped-def]
            size = (exact.tokens, exact.shape.top_k)
            fused_experts(
                torch.empty(exact.tokens, exact.shape.hidden, dtype=exact.dtype, device=meta),
                ExpertWeights.without_data(exact.form, exact.shape, exact.dtype, type(exact.activation), exact.bias),
                torch.empty(size, dtype=torch.float32, device=meta),
                torch.empty(size, dtype=torch.int32, device=meta),
                exact.expert_map(0),
                activation=exact.activation,
                path=exact.path,
                combine=exact.combine,
            )

        found |= set(launches_of(Target.GFX942, call))
    for sums in (case for case in cases if isinstance(case, Combining)):

        def combine(exact=sums.exact) -> None:  # type: ignore[no-untyped-def]
            rows = torch.empty(exact.tokens * exact.shape.top_k, exact.shape.hidden, dtype=exact.dtype, device=meta)
            ids = torch.empty(exact.tokens, exact.shape.top_k, dtype=torch.int32, device=meta)
            slots = torch.empty(exact.shape.experts, dtype=torch.int32, device=meta)
            out = torch.empty(exact.tokens, exact.shape.hidden, dtype=exact.dtype, device=meta)
            launch_combine(rows, ids, slots, exact.shape.local_experts, out)

        found |= set(launches_of(Target.GFX942, combine))
    for case in (case for case in cases if isinstance(case, RoutingCase)):

        def route(case=case) -> None:  # type: ignore[no-untyped-def]
            ids = torch.empty(case.tokens, case.shape.top_k, dtype=torch.int32, device=meta)
            slots = torch.empty(case.shape.experts, dtype=torch.int32, device=meta)
            table = RouteTable.empty(ids.numel(), case.shape.local_experts, case.block_m, meta)
            launch_route(ids, slots, case.shape.local_experts, table)

        found |= set(launches_of(Target.GFX942, route))
    paths = [Path.W8A16, Path.BF16, Path.W8A8, Path.BLOCK_FP8]
    every = calls(Target.GFX942, paths, ["minimax-m3", "gpt-oss-120b"], ["bf16", "fp16", "fp32"])
    return found, {launch for call in every for launch in launches_of(Target.GFX942, call.run)}


def test_the_gate_executes_every_machine_code_that_a_call_can_launch() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        found, listed = pool.submit(launched).result()
    missing = [(launch.kernel, dict(launch.constants), launch.attributes) for launch in listed - found]
    assert len(listed) > 100
    [(kernel, constants, attributes)] = missing  # its w13, of more than 2 GiB, has no 32-bit range
    assert (kernel, constants["BLOCK_K"]) == ("gate_up_kernel", 32)
    assert dict(attributes)["w13"] == (("tt.divisibility", 16),)


@pytest.mark.parametrize("seed", range(6))
def test_every_share_has_every_way_and_every_kernel(seed: int) -> None:
    cases = gate.share(seed)
    exact = [case.exact for case in cases if isinstance(case, LayerCase)]
    assert {(each.path, each.form, each.combine) for each in exact} == {
        (subject.path, subject.form, subject.combine) for subject in gate.SUBJECTS
    }
    assert {each.dtype for each in exact} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(each.combine is Combine.ATOMIC for each in exact)
    others = [case.problem for case in cases if isinstance(case, BudgetCase)] + exact
    assert sum(type(each.activation) is not SwiGLUOAI or each.bias is Bias.ADDED for each in others) == 2
    routes = [case.tokens * case.shape.top_k for case in cases if isinstance(case, RoutingCase)]
    assert min(routes) <= 4096 < max(routes)  # route_kernel; count_kernel and place_kernel
    assert any(each.tokens != gate.FEW for each in exact)
    names = [case.name for case in gate.every_case(seed)]
    assert len(set(names)) == len(names)
    assert [case.name for case in cases] == [case.name for case in gate.share(seed)]
    assert share(seed)[0] in subjects()


ASSEMBLY = """\
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
k:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0
	v_mov_b32_e32 v2, 0x80000000
	s_waitcnt lgkmcnt(0)
	v_cmp_gt_i32_e32 vcc, s2, v0
	v_cndmask_b32_e32 v1, v2, v1, vcc
	buffer_load_dword v3, v1, s[4:7], 0 offen
	s_waitcnt vmcnt(0)
	ds_write_b32 v0, v3
	s_barrier
	v_cmp_o_f32_e32 vcc, v3, v3
	v_mfma_f32_16x16x16_bf16 v[4:7], v[8:9], v[10:11], v[4:7]
	s_and_saveexec_b64 s[8:9], vcc
	s_endpgm
	.section .rodata
	.amdhsa_kernel k
		.amdhsa_next_free_vgpr 12
		.amdhsa_next_free_sgpr 16
		.amdhsa_accum_offset 12
	.end_amdhsa_kernel
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .args:           []
    .group_segment_fixed_size: 0
    .kernarg_segment_size: 8
    .max_flat_workgroup_size: 64
    .name:           k
...
	.end_amdgpu_metadata
"""


def test_faults_are_of_the_kind_that_the_instruction_is() -> None:
    program = parse(ASSEMBLY)
    kinds = {
        kind: [program.instructions[place].opcode for place in places] for kind, places in kinds_of(program).items()
    }
    assert kinds == {
        "barrier": ["s_barrier"],
        "lds": ["ds_write_b32"],
        "mfma": ["v_mfma_f32_16x16x16_bf16"],
        "wait": ["s_waitcnt", "s_waitcnt"],
        "mask": ["v_cmp_gt_i32_e32", "v_cndmask_b32_e32", "s_and_saveexec_b64"],
        "address": ["v_lshlrev_b32_e32", "v_mov_b32_e32"],
        "select": ["v_cmp_o_f32_e32"],
    }
    assert set(kinds) == set(KINDS)
