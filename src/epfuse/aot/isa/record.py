"""What an execution found, as data: the JSON record is the result, tables show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from epfuse.aot.isa.cases import CaseRecord
from epfuse.aot.isa.inject import KINDS, FaultRecord
from epfuse.aot.tables import TextTable
from epfuse.verify.record import versions

EVIDENCE = "gfx942: executed under an ISA model"


@dataclass(frozen=True)
class ExecutionRecord:
    """One run.

    Attributes:
        seed: of cases and of the waves' order.
        cases: in their order.
        faults: None where none was injected.
    """

    seed: int
    cases: list[CaseRecord]
    faults: FaultRecord | None

    @property
    def ok(self) -> bool:
        """Whether every case passed and enough faults were noticed."""
        return all(case.ok for case in self.cases) and (self.faults is None or self.faults.ok)

    @property
    def hashes(self) -> dict[str, str]:
        """Triton's hash of each machine code that ran -> its kernel."""
        return {hash: kernel for case in self.cases for hash, kernel in sorted(case.found.hashes.items())}

    def failures(self) -> Iterator[str]:
        """Everything that is wrong, a line each."""
        for case in self.cases:
            for failure in case.found.failures:
                yield f"{case.name}: {failure}"
        if self.faults is not None:
            yield from self.faults.failures()

    def to_json(self, command: str) -> dict[str, Any]:
        """The record as JSON-ready values; ``command`` is what was typed."""
        return {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "evidence": EVIDENCE,
            "seed": self.seed,
            "machine_codes": self.hashes,
            "cases": [case.to_json() for case in self.cases],
            "faults": None if self.faults is None else self.faults.to_json(),
            "ok": self.ok,
        }

    def tables(self) -> Iterator[TextTable]:
        """The cases, the machine codes, the faults."""
        rows = []
        for case in self.cases:
            figures = (str(case.found.launches), f"{case.found.instructions:,}", f"{case.found.seconds:.1f}")
            rows.append((case.name, "pass" if case.ok else "FAIL", *figures))
        yield TextTable(f"{EVIDENCE}, seed {self.seed}", ("case", "result", "launches", "wave instructions", "s"), rows)
        yield _work(self.cases)
        kernels = Counter(self.hashes.values())
        yield TextTable(
            "Machine codes that ran", ("kernel", "codes"), [(k, str(n)) for k, n in sorted(kernels.items())]
        )
        if self.faults is not None:
            yield _kinds(self.faults)
            yield _survivors(self.faults)


def _work(cases: list[CaseRecord]) -> TextTable:
    kinds = ("matrix", "vector", "LDS", "memory", "scalar", "wait")
    rows = []
    for case in cases:
        for work in case.found.work:
            ratio = work.line_bytes / work.assumed_bytes
            rows.append(
                (
                    case.name.removeprefix("layer "),
                    work.kernel.removesuffix("_kernel"),
                    *(f"{work.instructions.get(kind, 0):,}" for kind in kinds),
                    f"{work.weight_bytes:,}",
                    f"{work.line_bytes:,}",
                    f"{work.assumed_bytes:,}",
                    f"{ratio:.2f}",
                    f"{100 * work.lds_conflicts / max(work.lds_passes, 1):.0f} %",
                )
            )
    columns = ("layer", "GEMM", *kinds, "weights asked, B", "in lines, B", "model, B", "lines/model", "LDS conflicts")
    return TextTable(
        "Wave instructions executed by the GEMMs, weights read, LDS passes lost to conflicts", columns, rows
    )


def _kinds(faults: FaultRecord) -> TextTable:
    rows = []
    for kind in KINDS:
        ran = faults.of(kind)
        how = Counter(fault.outcome for fault in ran if fault.outcome)
        in_all = sum(kernel.total[kind] for kernel in faults.kernels)
        words = ", ".join(f"{count} {name}" for name, count in how.most_common())
        figures = (str(in_all), str(len(ran)), str(how.total()), f"{100 * faults.noticed(kind):.1f} %")
        rows.append((kind, *figures, words))
    title = f"Instructions dropped, one at a time, in {len(faults.kernels)} GEMMs"
    return TextTable(title, ("kind", "in all", "dropped", "noticed", "share", "noticed as"), rows)


def _survivors(faults: FaultRecord) -> TextTable:
    rows = [(kernel, fault.kind, f"`{fault.text}`", fault.reason) for kernel, fault in faults.survivors()]
    return TextTable("Drops that nothing noticed", ("kernel", "kind", "instruction", "perhaps because"), rows)
