"""Draw the tables of gfx942's instructions: each mnemonic (docs/isa-gfx942.md), and each meaning (docs/mi300x.md).

epfuse aot --target gfx942 --out assembly
epfuse aot --target gfx942 --out assembly-3.6  # where Triton 3.6 is installed
python -m tools.isa_table assembly assembly-3.6
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from epfuse.aot.isa.meanings import Meaning, rows
from epfuse.aot.isa.program import parse
from epfuse.aot.isa.vector_forms import bare
from epfuse.report.write import write_atomic

DOCS = Path(__file__).parents[1] / "docs"
HEAD = """# The instructions of gfx942's kernels

What the ISA model of `epfuse aot --execute` ([mi300x.md](mi300x.md)) takes each instruction to mean, and from where.
Mnemonics are without the encoding's suffix. *Differs* says what is known to be different on hardware. *Stages* are
those whose kernels have it as Triton 3.7.1, which the gate is pinned to, compiles them, and then as 3.6.0 does.
`tools.isa_table` draws this page from `epfuse.aot.isa.meanings`; a test holds the two together.

| mnemonic | kind | meaning from | second source | differs | stages | stages, 3.6.0 |
| --- | --- | --- | --- | --- | --- | --- |
"""
SHORT_HEAD = """| instruction | types | meaning from | second source | differs | stages |
| --- | --- | --- | --- | --- | --- |
"""
Stages = Mapping[str, set[str]]
"""Mnemonic -> the stages whose kernels have it."""
BEGIN, END = "<!-- tools.isa_table -->\n", "<!-- end of the table -->\n"
_TYPE = re.compile(r"_(?:((?:[biuf]|bf|fp)\d+(?:_(?:[biuf]|bf|fp)\d+)*)|(dword(?:x\d+)?|[us]?byte|[us]?short))$")


def users(folder: Path) -> dict[str, set[str]]:
    """Mnemonic -> the stages whose kernels have it, from the files that ``epfuse aot --out`` wrote."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.glob("gfx942.*.s")):
        stage = file.name.split(".")[1].split("-")[0]
        for instruction in parse(file.read_text()).instructions:
            found.setdefault(bare(instruction.opcode)[0], set()).add(stage)
    return found


def drawn_users(page: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The same of both versions, from the page."""
    pinned: dict[str, set[str]] = {}
    older: dict[str, set[str]] = {}
    for line in page.removeprefix(HEAD).splitlines():
        mnemonic, *_, now, before = (cell.strip() for cell in line.split("|")[1:-1])
        for found, stages in ((pinned, now), (older, before)):
            found[mnemonic.strip("`")] = set(stages.split(", ")) - {""}
    return pinned, older


def lines(pinned: Stages, older: Stages) -> Iterator[str]:
    """A row for each mnemonic."""
    for row in rows():
        users = (", ".join(sorted(stages.get(row.mnemonic, ()))) for stages in (pinned, older))
        cells = (f"`{row.mnemonic}`", row.kind, row.source, row.second_source, row.differs, *users)
        yield f"| {' | '.join(cells)} |"


def page(pinned: Stages, older: Stages) -> str:
    """The whole page."""
    return HEAD + "\n".join(lines(pinned, older)) + "\n"


def meanings(stages: Stages) -> str:
    """A row for each meaning that a kernel has: mnemonics of several types are one, if their sources are."""
    found: dict[tuple[str, str, str, str], list[Meaning]] = {}
    for row in rows():
        if stages.get(row.mnemonic):
            name = _TYPE.sub("", row.mnemonic)
            found.setdefault((name, row.source, row.second_source, row.differs), []).append(row)
    drawn = []
    for (name, source, second, differs), group in found.items():
        types = ", ".join(row.mnemonic.removeprefix(name).removeprefix("_") for row in group)
        users = ", ".join(sorted(set().union(*(stages[row.mnemonic] for row in group))))
        cells = (f"`{name}`", types, *(_short(text) for text in (source, second, differs)), users)
        drawn.append(f"| {' | '.join(cells)} |")
    return SHORT_HEAD + "\n".join(drawn) + "\n"


_NAMES = {
    "AMD's pseudocode in tinygrad 0.14.0, runtime/autogen/amd/cdna/str_pcode.py": "pseudocode",
    'AMD, "AMD Instinct MI300 Instruction Set Architecture"': "ISA document",
    "AMD, amd_matrix_instruction_calculator": "AMD's calculator",
    "Triton, lib/Dialect/TritonGPU/IR/Dialect.cpp and LinearLayoutConversions.cpp": "Triton's layouts",
    "LLVM, AMDGPUUsage and lib/Target/AMDGPU": "LLVM",
    "LLVM, SIInsertWaitcnts.cpp": "LLVM's waits",
    "LLVM, GCNHazardRecognizer.cpp": "LLVM's hazards",
    "values by hand and NumPy (tests/aot/isa)": "by hand, NumPy",
    "values by hand (tests/aot/isa)": "by hand",
    "torch (tests/aot/isa/test_torch.py)": "torch",
}
"""Sources -> what the short table calls them; docs/mi300x.md says which they are."""


def _short(text: str) -> str:
    """The first sentence, with the sources' short names."""
    for long, short in _NAMES.items():
        text = text.replace(long, short)
    return text.partition(". ")[0].removesuffix(".")


def with_meanings(text: str, stages: Stages) -> str:
    """docs/mi300x.md with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + meanings(stages) + END + after


if __name__ == "__main__":
    pinned, older = (users(Path(folder)) for folder in sys.argv[1:])
    write_atomic(DOCS / "isa-gfx942.md", page(pinned, older))
    write_atomic(DOCS / "mi300x.md", with_meanings((DOCS / "mi300x.md").read_text(), pinned))
