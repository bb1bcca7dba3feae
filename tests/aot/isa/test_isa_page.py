"""docs/isa-gfx942.md says what the model does."""

from __future__ import annotations

from pathlib import Path

from tools.isa_table import HEAD, page

from epfuse.aot.isa.meanings import rows

PAGE = Path(__file__).parents[3] / "docs" / "isa-gfx942.md"


def test_the_page_is_what_the_tool_draws() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    stages = {}
    for line in text.removeprefix(HEAD).splitlines():
        mnemonic, *_, users = (cell.strip() for cell in line.split("|")[1:-1])
        stages[mnemonic.strip("`")] = set(users.split(", ")) - {""}
    assert text == page(stages)
    assert [row.mnemonic for row in rows()] == list(stages)
