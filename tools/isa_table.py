"""Draw docs/isa-gfx942.md: every instruction of gfx942's kernels, where the model's meaning of it is from.

epfuse aot --target gfx942 --out assembly
python -m tools.isa_table assembly > docs/isa-gfx942.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from epfuse.aot.isa.meanings import rows
from epfuse.aot.isa.program import parse
from epfuse.aot.isa.vector_forms import bare

HEAD = """# The instructions of gfx942's kernels

What the ISA model of `epfuse aot --execute` ([mi300x.md](mi300x.md)) takes each instruction to mean, and from where.
Mnemonics are without the encoding's suffix. *Differs* says what is known to be different on hardware. `tools.isa_table`
draws this page from `epfuse.aot.isa.meanings`; a test holds the two together.

| mnemonic | kind | meaning from | second source | differs | stages |
| --- | --- | --- | --- | --- | --- |
"""


def users(folder: Path) -> dict[str, set[str]]:
    """Mnemonic -> the stages whose kernels have it, from the files that ``epfuse aot --out`` wrote."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.glob("gfx942.*.s")):
        stage = file.name.split(".")[1].split("-")[0]
        for instruction in parse(file.read_text()).instructions:
            found.setdefault(bare(instruction.opcode)[0], set()).add(stage)
    return found


def lines(stages: Mapping[str, set[str]]) -> Iterator[str]:
    """A row for each meaning."""
    for row in rows():
        users = ", ".join(sorted(stages.get(row.mnemonic, ())))
        cells = (f"`{row.mnemonic}`", row.kind, row.source, row.second_source, row.differs, users)
        yield f"| {' | '.join(cells)} |"


def page(stages: Mapping[str, set[str]]) -> str:
    """The whole page."""
    return HEAD + "\n".join(lines(stages)) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(users(Path(sys.argv[1]))))
