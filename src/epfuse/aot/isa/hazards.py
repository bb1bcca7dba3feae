"""What a wave must wait for: results of memory by counters, results of vector instructions by wait states.

Counters follow AMD's "AMD Instinct MI300 Instruction Set Architecture" (4.4, Data Dependency Resolution) and LLVM's
`AMDGPUUsage` and `SIInsertWaitcnts.cpp`: VMCNT counts vector memory, loads and stores, and they return in order;
LGKMCNT counts LDS, which returns in order, and scalar loads, which do not. Wait states follow that document's 4.5
(Manually Inserted Wait States), its table 37 for matrix instructions, and LLVM's `GCNHazardRecognizer.cpp`: an
instruction is one state, ``s_nop n`` is n + 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epfuse.aot.isa.errors import HazardError
from epfuse.aot.isa.registers import EXEC, VCC, VECTORS

if TYPE_CHECKING:
    from epfuse.aot.isa.wave import Step, Wave

VECTOR_REGISTERS = ~((1 << VECTORS) - 1)
SCALAR_REGISTERS = (1 << 128) - 1 & ~(3 << EXEC)


@dataclass(slots=True)
class PendingAccess:
    """A memory instruction that has not been waited for.

    Attributes:
        targets: the registers that it loads.
        line: of the assembly.
        scalar: whether it is a scalar load.
        settle: called when it is known to be done.
    """

    targets: int
    line: int
    scalar: bool = False
    settle: Callable[[], None] | None = None


class Outstanding:
    """What a wave has asked of memory and not waited for, oldest first.

    ``pending`` are the registers that are still to be written.
    """

    __slots__ = ("lds", "pending", "vector", "waited")

    def __init__(self) -> None:
        self.vector: list[PendingAccess] = []
        self.lds: list[PendingAccess] = []
        self.pending: int = 0
        self.waited: dict[str, int] = {"vmcnt": 0, "lgkmcnt": 0}

    def ask(self, request: PendingAccess, *, vector: bool) -> None:
        """Note a request."""
        (self.vector if vector else self.lds).append(request)
        self.pending |= request.targets

    def wait(self, counts: dict[str, int]) -> None:
        """Wait until at most so many requests are left of each counter."""
        if "vmcnt" in counts:
            self._finish("vmcnt", self.vector[: max(0, len(self.vector) - counts["vmcnt"])])
        if "lgkmcnt" in counts:
            self._finish("lgkmcnt", self._returned(counts["lgkmcnt"]))

    def _returned(self, left: int) -> list[PendingAccess]:
        """What LGKMCNT at ``left`` is sure to have covered."""
        if not left:
            return list(self.lds)
        # scalar loads may all have returned first, and none of them is sure to have: only LDS beyond the count is
        shared = [each for each in self.lds if not each.scalar]
        return shared[: max(0, len(shared) - left)]

    def _finish(self, counter: str, done: list[PendingAccess]) -> None:
        if not done:
            return
        self.waited[counter] += 1
        finished = {id(request) for request in done}
        for request in done:
            if request.settle is not None:
                request.settle()
        self.vector = [each for each in self.vector if id(each) not in finished]
        self.lds = [each for each in self.lds if id(each) not in finished]
        self.pending = 0
        for request in (*self.vector, *self.lds):
            self.pending |= request.targets

    def culprit(self, registers: int) -> tuple[str, int]:
        """Which counter and line stand behind a pending register."""
        for counter, queue in (("vmcnt", self.vector), ("lgkmcnt", self.lds)):
            for request in queue:
                if request.targets & registers:
                    return counter, request.line
        raise AssertionError("a pending register has a request")


@dataclass(frozen=True, slots=True)
class Result:
    """What a vector instruction did that later ones must keep a distance from.

    Attributes:
        registers: written, or read where ``kind`` is "addend" or "stored".
        clock: when.
        kind: "matrix", "addend" (C of a matrix instruction), "transcendental", "part" (of a register), "scalar" (a
            scalar register written by a vector instruction), "stored" (data of a store of more than 8 bytes).
        line: of the assembly.
        last: the clock until which something may have to keep a distance.
        passes, xdl: of a matrix instruction.
    """

    registers: int
    clock: int
    kind: str
    line: int
    last: int
    passes: int = 0
    xdl: bool = False


LONGEST: dict[str, int] = {"stored": 2, "transcendental": 1, "part": 1, "scalar": 5}
"""Wait states that `needed` asks for at most, by the kind of the earlier result."""
MANY = 32
"""Results from which old ones are dropped, if no check has."""


class Recent:
    """A wave's vector instructions of late.

    ``hot`` are the registers that some distance must be kept from.
    """

    __slots__ = ("hot", "last", "results")

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.hot: int = 0
        self.last: deque[tuple[int, int, int]] = deque(maxlen=5)
        """Clock, written registers and line of the last vector instructions."""

    def note(self, step: Step, clock: int) -> None:
        """Remember what ``step``, which is ``noted``, did at ``clock``."""
        line = step.instruction.line
        facts = step.facts
        if step.kind == "mfma":
            passes, xdl = facts["passes"], bool(facts["xdl"])
            self._keep(step.writes, clock, "matrix", line, passes + 3, passes, xdl)
            if facts["c"] and xdl:
                self._keep(facts["c"], clock, "addend", line, passes, passes, xdl)
            return
        if step.kind == "vmem":
            self._keep(facts["stored"], clock, "stored", line)
            return
        self.last.append((clock, step.writes, line))
        if facts:
            if "transcendental" in facts:
                self._keep(step.writes, clock, "transcendental", line)
            if "part" in facts:
                self._keep(step.writes, clock, "part", line)
        if scalar := step.writes & SCALAR_REGISTERS:
            self._keep(scalar, clock, "scalar", line)

    def _keep(
        self, registers: int, clock: int, kind: str, line: int, longest: int = 0, passes: int = 0, xdl: bool = False
    ) -> None:
        if len(self.results) > MANY:
            self.results = [each for each in self.results if clock <= each.last]
        last = clock + (longest or LONGEST[kind])
        self.results.append(Result(registers, clock, kind, line, last, passes, xdl))
        self.hot |= registers

    def check(self, wave: Wave, step: Step) -> None:
        """Raise if ``step`` comes too soon.

        Raises:
            HazardError: it does.
        """
        clock, touched = wave.clock, step.touched
        left, hot = [], 0
        for result in self.results:
            if clock <= result.last:
                if result.registers & touched:
                    _keep(clock - result.clock - 1, needed(result, step), result.line, step, result.kind)
                left.append(result)
                hot |= result.registers
        self.results, self.hot = left, hot

    def check_near(self, wave: Wave, step: Step) -> None:
        """Raise if a matrix, DPP or lane-reading instruction comes too soon after a vector instruction.

        Raises:
            HazardError: it does.
        """
        if step.kind == "mfma" or "dpp" in step.facts:
            distance, registers = 2, step.reads & VECTOR_REGISTERS
        else:
            distance, registers = 1, step.reads & VECTOR_REGISTERS
        for clock, written, line in self.last:
            if written & registers:
                _keep(wave.clock - clock - 1, distance, line, step, "vector")


def _keep(passed: int, wanted: int, line: int, step: Step, kind: str) -> None:
    if passed < wanted:
        raise HazardError(
            f"{step.instruction.text} comes {passed} wait states after line {line} ({kind}); it must be {wanted}",
            step.instruction.line,
        )


def needed(result: Result, step: Step) -> int:
    """Wait states that must lie between an earlier result and ``step``, which touches its registers."""
    reads, writes = step.reads & result.registers, step.writes & result.registers
    if result.kind == "matrix":
        return _after_matrix(result, step)
    if result.kind == "addend":
        # VALU and loads; {2: 1, 4: 3, 8: 7, 16: 15}
        return result.passes - 1 if writes and step.kind in ("valu", "vmem", "lds") else 0
    if result.kind == "stored":
        return 2 if writes and step.kind == "valu" else 0
    if result.kind == "transcendental":
        return 1 if reads and step.kind == "valu" and "transcendental" not in step.facts else 0
    if result.kind == "part":
        return 1 if reads and step.kind == "valu" else 0
    if not reads:
        return 0
    if step.kind == "vmem":
        return 5
    if step.kind == "valu":
        return 4 if "division" in step.facts and reads & 3 << VCC else 2
    return 0


def _after_matrix(result: Result, step: Step) -> int:
    more = 3 if result.xdl else 2
    if step.kind != "mfma":
        return result.passes + more if step.kind in ("valu", "vmem", "lds") else 0
    wanted = 0
    if step.facts["ab"] & result.registers:
        wanted = result.passes + more
    if step.facts["c"] & result.registers:
        if step.facts["c"] == result.registers:
            wanted = max(wanted, 2 if result.passes == 2 else 0)
        elif result.xdl or not step.facts["xdl"]:
            wanted = max(wanted, result.passes + (1 if result.xdl else 0))
    return wanted
