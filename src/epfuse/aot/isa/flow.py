"""Instructions of the program's flow: branches, waits, barriers."""

from __future__ import annotations

from collections.abc import Callable

from epfuse.aot.isa.operands import expect, unknown
from epfuse.aot.isa.program import Constant, Instruction, Label
from epfuse.aot.isa.registers import EXEC, SCC, VCC
from epfuse.aot.isa.wave import Step, Wave, refuse_undefined

_BRANCHES: dict[str, tuple[int, Callable[[Wave], bool]]] = {
    "s_branch": (0, lambda wave: True),
    "s_cbranch_scc0": (1 << SCC, lambda wave: not wave.scalars[SCC]),
    "s_cbranch_scc1": (1 << SCC, lambda wave: bool(wave.scalars[SCC])),
    "s_cbranch_vccz": (3 << VCC, lambda wave: not wave.pair(VCC)),
    "s_cbranch_vccnz": (3 << VCC, lambda wave: bool(wave.pair(VCC))),
    "s_cbranch_execz": (3 << EXEC, lambda wave: not wave.pair(EXEC)),
    "s_cbranch_execnz": (3 << EXEC, lambda wave: bool(wave.pair(EXEC))),
}


def decode(name: str, instruction: Instruction, labels: dict[str, int]) -> Step | None:
    """A step of the program's flow; None if ``name`` is none."""
    if name in _BRANCHES:
        expect(instruction, 1)
        [label] = instruction.operands
        if not isinstance(label, Label) or label.name not in labels:
            raise unknown(instruction, "a branch to no label")
        place = labels[label.name]
        reads, taken = _BRANCHES[name]

        def branch(wave: Wave) -> None:
            if taken(wave):
                wave.place = place

        return Step(instruction, name, "flow", branch, reads, 0, refuse_undefined(reads, instruction, "a branch"))
    if name == "s_waitcnt":
        return _wait(name, instruction)
    if name in ("s_nop", "s_setprio"):
        expect(instruction, 1)
        [operand] = instruction.operands
        most = 15 if name == "s_nop" else 3
        if not isinstance(operand, Constant) or operand.value not in range(most + 1):
            raise unknown(instruction, f"the operand must be 0 to {most}")
        states = int(operand.value) + 1 if name == "s_nop" else 1
        return Step(instruction, name, "flow", lambda wave: None, 0, 0, lambda wave: None, states=states)
    if name in ("s_endpgm", "s_barrier"):
        expect(instruction, 0)
        return Step(instruction, name, "flow", lambda wave: None, 0, 0, lambda wave: None, stops=True)
    return None


_COUNTERS = {"vmcnt": 63, "lgkmcnt": 15, "expcnt": 7}


def _wait(name: str, instruction: Instruction) -> Step:
    expect(instruction, 0, *_COUNTERS)
    counts = {}
    for counter, most in _COUNTERS.items():
        value = instruction.modifiers.get(counter)
        if value is not None:
            if not isinstance(value, int) or not 0 <= value <= most:
                raise unknown(instruction, f"{counter} must be 0 to {most}")
            counts[counter] = value
    if not counts:
        raise unknown(instruction, "a wait for nothing that is known")

    def run(wave: Wave) -> None:
        wave.waits.wait(counts)

    return Step(instruction, name, "flow", run, 0, 0, lambda wave: None)
