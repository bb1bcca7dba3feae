"""Fault injection: drop instructions of the GEMMs one at a time, and see whether the gate notices."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from epfuse.aot.isa.edges import Gemm
from epfuse.aot.isa.errors import IsaError
from epfuse.aot.isa.expected import Expected, compare, expected
from epfuse.aot.isa.gate import gemms
from epfuse.aot.isa.kept import Kept
from epfuse.aot.isa.program import Instruction, Program
from epfuse.aot.isa.recorded import Launched, Recorded
from epfuse.aot.isa.registers import EXEC, Register
from epfuse.aot.tasks import start
from epfuse.workers import Died, Workers

SEED = 1782
"""Of the sample. Committed before the gate was run for the first time, and never tuned."""
EACH = 4
"""Faults of a kind and a kernel."""
LEAST = 0.95
"""Part of the reached faults of each kind that must be noticed."""
KINDS = ("barrier", "lds", "mfma", "wait", "mask", "address", "select")
"""mask: what decides which lanes of a memory instruction take part, and what writes EXEC; address: what makes the
address of a memory instruction; select: other comparisons and choices (clamp, NaN, the range of exp)."""
UNBOUND = frozenset({"select"})
"""Kinds of which no share must be noticed: many of their faults change no number."""
DEPTH = 3
"""How many instructions back from a memory instruction its address is followed."""

REASONS = {
    "barrier": "the waves' order of this run needs none here",
    "lds": "the value is not used",
    "mfma": "the product is not used",
    "wait": "what it waits for is covered by a later wait before anything uses it",
    "mask": "every lane that it leaves out is left out by something else as well, or none is",
    "address": "what it adds is zero here",
    "select": "no number of the case is on its other side",
}
"""Why a fault of a kind may change nothing: a guess by kind. docs/mi300x.md says which survivors were traced."""

_MEMORY = ("buffer_", "global_", "ds_")


def kinds_of(program: Program) -> dict[str, list[int]]:
    """Index of each instruction that a kind of fault drops."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    slices = _address_slices(program)
    for index, instruction in enumerate(program.instructions):
        opcode = instruction.opcode
        if opcode == "s_barrier":
            found["barrier"].append(index)
        elif opcode.startswith("ds_"):
            found["lds"].append(index)
        elif opcode.startswith("v_mfma"):
            found["mfma"].append(index)
        elif opcode == "s_waitcnt":
            found["wait"].append(index)
        elif _writes_exec(instruction) or (index in slices and _chooses(instruction)):
            found["mask"].append(index)
        elif _chooses(instruction):
            found["select"].append(index)
        elif index in slices and opcode.startswith("v_"):
            found["address"].append(index)
    return found


def _chooses(instruction: Instruction) -> bool:
    """Whether it compares lanes, chooses between values by lane, or combines such choices."""
    opcode = instruction.opcode
    logic = opcode.startswith(("s_and", "s_or", "s_xor", "s_not", "s_cselect")) and opcode.endswith("_b64")
    return opcode.startswith(("v_cmp", "v_cndmask")) or logic


def _writes_exec(instruction: Instruction) -> bool:
    if "saveexec" in instruction.opcode:
        return True
    first = instruction.operands[0] if instruction.operands else None
    return isinstance(first, Register) and first.first <= EXEC < first.first + first.count


def _address_slices(program: Program) -> set[int]:
    """Instructions that make a vector address, up to `DEPTH` back from the memory instruction that takes it."""
    last: dict[int, int] = {}  # register -> the instruction that wrote it last, in the order of the text
    made: dict[int, set[int]] = {}  # instruction -> those that made its operands
    found: set[int] = set()
    for index, instruction in enumerate(program.instructions):
        registers = [operand for operand in instruction.operands if isinstance(operand, Register)]
        if instruction.opcode.startswith(_MEMORY):
            for operand in _address_operands(instruction):
                step = {last[number] for number in _numbers(operand) if number in last}
                for _ in range(DEPTH):
                    found |= step
                    step = {before for each in step for before in made.get(each, ())}
        made[index] = {last[number] for operand in registers[1:] for number in _numbers(operand) if number in last}
        if registers and _writes_first(instruction):
            last.update(dict.fromkeys(_numbers(registers[0]), index))
    return found


def _writes_first(instruction: Instruction) -> bool:
    """Whether the first operand is the destination."""
    opcode = instruction.opcode
    return not opcode.startswith(("s_cmp", "s_cbranch", "s_bitcmp")) and not ("store" in opcode or "write" in opcode)


def _address_operands(instruction: Instruction) -> list[Register]:
    """The vector address: first operand of what writes, second of what reads, as the assembly has them."""
    vectors = [each for each in instruction.operands if isinstance(each, Register) and not each.is_scalar]
    opcode = instruction.opcode
    if opcode.startswith("buffer_"):
        return vectors[1:2]
    reads = "read" in opcode or "load" in opcode or opcode in ("ds_bpermute_b32", "ds_swizzle_b32")
    return vectors[1:2] if reads else vectors[:1]


def _numbers(register: Register) -> range:
    return range(register.first, register.first + register.count)


@dataclass(frozen=True)
class Fault:
    """One dropped instruction.

    Attributes:
        kind: of `KINDS`.
        index: of the instruction.
        text: its line.
        outcome: how it was noticed: a kind of error, or "mismatch"; "" if it was not.
        reached: whether a wave executed the instruction at all.
    """

    kind: str
    index: int
    text: str
    outcome: str
    reached: bool

    @property
    def reason(self) -> str:
        """Why it may not have been noticed, as far as the kind says it."""
        return REASONS[self.kind] if self.reached else "the case does not run it"


@dataclass
class Injected:
    """The faults of one kernel.

    Attributes:
        kernel: its name and way.
        faults: the sample.
        total: instructions of each kind in the kernel.
    """

    kernel: str
    faults: list[Fault] = field(default_factory=list)
    total: dict[str, int] = field(default_factory=dict)


def subjects() -> list[Gemm]:
    """The GEMMs of every way, with a tail and without."""
    return gemms(SEED)


def share(seed: int) -> list[Gemm]:
    """One of the kernels, by a seed."""
    return [random.Random(seed).choice(subjects())]


def inject(gemm: Gemm, kept: Kept) -> Injected:
    """Drop `EACH` instructions of every kind of one kernel, one at a time, or take what is kept of that."""
    if (before := kept.load(gemm.name, Injected)) is not None:
        return before
    launches = gemm.launches()
    wanted = [expected(recorded) for recorded in launches]
    program, found, reached = launches[0].program, Injected(gemm.name), set[int]()
    for recorded, want in zip(launches, wanted, strict=True):
        launched = recorded.run()
        if compare(launched, want):
            raise IsaError(f"{gemm.name} is wrong before anything is dropped")
        reached |= launched.counts.reached
    draw = random.Random(f"{SEED} {found.kernel}")
    for kind, places in kinds_of(program).items():
        found.total[kind] = len(places)
        for index in sorted(draw.sample(places, min(EACH, len(places)))):
            outcome, faulty = "", program.without(index)
            for recorded, want in zip(launches, wanted, strict=True):
                outcome = outcome or _outcome(recorded, faulty, want)
            found.faults.append(Fault(kind, index, program.instructions[index].text, outcome, index in reached))
    return kept.save(gemm.name, Injected, found)


class _Mismatch(Exception):
    """A workgroup has written what is wrong: the others need not run."""


def _outcome(recorded: Recorded, program: Program, wanted: dict[str, Expected]) -> str:
    def watch(launched: Launched) -> None:
        if compare(launched, wanted, whole=False):
            raise _Mismatch

    sums = bool(recorded.arguments.get("ATOMIC"))  # what is there is part of a sum until the last workgroup ends
    try:
        launched = recorded.run(program, watch=None if sums else watch)
    except IsaError as error:
        return type(error).__name__
    except _Mismatch:
        return "mismatch"
    return "mismatch" if compare(launched, wanted) else ""


@dataclass(frozen=True)
class FaultRecord:
    """The faults of a run.

    Attributes:
        kernels: each with its sample.
        died: kernels whose process ended, and why.
    """

    kernels: list[Injected]
    died: list[str]

    def of(self, kind: str) -> list[Fault]:
        """All faults of a kind whose instruction ran at all."""
        return [fault for kernel in self.kernels for fault in kernel.faults if fault.kind == kind and fault.reached]

    def noticed(self, kind: str) -> float:
        """Part of them that was noticed; 1 where there is none."""
        faults = self.of(kind)
        return sum(bool(fault.outcome) for fault in faults) / len(faults) if faults else 1.0

    def enough(self, kind: str) -> bool:
        """Whether `LEAST` of a kind's faults were noticed; of a share that has few, all but one."""
        missed = sum(not fault.outcome for fault in self.of(kind))
        return kind in UNBOUND or missed <= 1 or self.noticed(kind) >= LEAST

    @property
    def ok(self) -> bool:
        """Whether enough faults of each kind were noticed."""
        return not self.died and all(self.enough(kind) for kind in KINDS)

    def survivors(self) -> Iterator[tuple[str, Fault]]:
        """Faults that changed nothing, each with its kernel."""
        for kernel in self.kernels:
            for fault in kernel.faults:
                if not fault.outcome:
                    yield kernel.kernel, fault

    def failures(self) -> Iterator[str]:
        """What is wrong, a line each."""
        yield from self.died
        for kind in KINDS:
            if not self.enough(kind):
                yield f"of the faults of kind {kind} {100 * self.noticed(kind):.1f} % were noticed, under {LEAST:.0%}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "seed": SEED,
            "least": LEAST,
            "kinds": {
                kind: {
                    "instructions": sum(kernel.total[kind] for kernel in self.kernels),
                    "faults": len(self.of(kind)),
                    "outcomes": dict(Counter(fault.outcome or "survived" for fault in self.of(kind))),
                    "noticed": round(self.noticed(kind), 4),
                }
                for kind in KINDS
            },
            "survivors": [
                {"kernel": kernel, "kind": fault.kind, "line": fault.text, "guess": fault.reason}
                for kernel, fault in self.survivors()
            ],
            "kernels": {
                kernel.kernel: Counter(fault.outcome or "survived" for fault in kernel.faults)
                for kernel in self.kernels
            },
            "died": self.died,
            "ok": self.ok,
        }


def run(chosen: list[Gemm], workers: int, kept: Kept, progress: Callable[[int, int], None]) -> FaultRecord:
    """Break kernels in parallel.

    Args:
        chosen: of `subjects`.
        workers: processes.
        kept: results that are there already, and where new ones go.
        progress: called with the kernels done and the kernels in all.
    """
    progress(0, len(chosen))
    with Workers(workers, start, seconds=3600.0) as pool:
        results = pool.map(inject, [(gemm, kept) for gemm in chosen], lambda done: progress(done, len(chosen)))
    died = [
        f"{gemm.name}: {result.reason}"
        for gemm, result in zip(chosen, results, strict=True)
        if isinstance(result, Died)
    ]
    return FaultRecord([result for result in results if isinstance(result, Injected)], died)
