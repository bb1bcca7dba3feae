"""A small layer as machine code: right as it is, noticed when it is broken."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from epfuse.aot.isa.cases import CaseRecord, Found, LayerCase, run_case
from epfuse.aot.isa.inject import Fault, FaultRecord, Injected
from epfuse.aot.isa.kept import Kept
from epfuse.aot.isa.layers import EXACT, Exact
from epfuse.aot.isa.record import ExecutionRecord
from epfuse.aot.tasks import start
from epfuse.config import Combine, LayerShape, Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.target import Target

SMALL = Exact(
    Path.BF16, WeightFormat.DENSE, torch.bfloat16, Combine.DETERMINISTIC, LayerShape(160, 48, 8, 4, 2), 3, 5, 0
)
"""Tails in both loops, and blocks of several experts."""


def executed() -> tuple[Found, list[str]]:
    """The layer's findings; and what becomes of its gate_up without a first barrier, wait and MFMA."""
    from epfuse.aot.isa.device import executing
    from epfuse.aot.isa.errors import IsaError
    from epfuse.aot.isa.expected import mismatches
    from epfuse.api import fused_experts

    operands = SMALL.hidden(), SMALL.weights(0), SMALL.topk_weights(), SMALL.topk_ids(), SMALL.expert_map(0)
    with executing(Target.GFX942) as session:
        fused_experts(*operands, activation=EXACT, path=SMALL.path)
    recorded = next(each.recorded for each in session.launches if each.recorded.program.name == "gate_up_kernel")
    outcomes = []
    for opcode in ("s_barrier", "s_waitcnt", "v_mfma_f32_16x16x16_bf16"):
        first = next(place for place, each in enumerate(recorded.program.instructions) if each.opcode == opcode)
        try:
            wrong = mismatches(recorded.run(recorded.program.without(first)))
            outcomes.append("mismatch" if wrong else "")
        except IsaError as error:
            outcomes.append(type(error).__name__)
    return run_case(LayerCase(SMALL), 1, Kept(None, "")), outcomes


def test_a_layer_executes_without_a_mismatch_and_a_broken_one_does_not() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        found, outcomes = pool.submit(executed).result()
    assert found.failures == []
    assert found.launches == 4
    assert set(found.hashes.values()) == {"route_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"}
    gate_up, down = found.work
    assert gate_up.instructions["matrix"] > 0
    assert gate_up.line_bytes >= gate_up.weight_bytes > 0
    assert gate_up.assumed_bytes == 2 * down.assumed_bytes
    assert outcomes == ["HazardError", "HazardError", "mismatch"]


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from epfuse.aot.isa.device import executing

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is 1"), executing(Target.GFX942):
        pass
    with pytest.raises(ConfigError, match="target is sm_90"), executing(Target.SM90):
        pass


def test_too_many_survivors_fail_the_record() -> None:
    faults = [Fault("mfma", place, "v_mfma", "mismatch" if place > 1 else "", True) for place in range(40)]
    enough = FaultRecord(
        [Injected("k", faults, dict.fromkeys(("mfma", "barrier", "lds", "wait", "mask", "address", "select"), 20))], []
    )
    assert enough.noticed("mfma") == 0.95
    assert enough.ok
    too_few = FaultRecord([Injected("k", faults[:39], enough.kernels[0].total)], [])
    assert not too_few.ok
    record = ExecutionRecord(0, [CaseRecord("a layer", Found())], too_few)
    assert not record.ok
    assert list(record.failures()) == ["of the faults of kind mfma 94.9 % were noticed, under 95%"]
    assert not ExecutionRecord(0, [CaseRecord("a layer", Found(["wrong"]))], None).ok
    (kernel, survivor), _ = enough.survivors()
    assert (kernel, survivor.reason) == ("k", "the product is not used")
    assert len(list(ExecutionRecord(0, [CaseRecord("a layer", Found())], enough).tables())) == 5
