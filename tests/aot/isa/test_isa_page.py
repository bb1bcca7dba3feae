"""docs/isa-gfx942.md and the table in docs/mi300x.md say what the model does."""

from __future__ import annotations

from tools.isa_table import BEGIN, DOCS, END, HEAD, drawn_users, page, with_meanings

from epfuse.aot.isa.meanings import rows


def test_the_pages_are_what_the_tool_draws() -> None:
    text = (DOCS / "isa-gfx942.md").read_text()
    assert text.startswith(HEAD)
    pinned, older = drawn_users(text)
    assert text == page(pinned, older)
    assert [row.mnemonic for row in rows()] == list(pinned)
    mi300x = (DOCS / "mi300x.md").read_text()
    assert mi300x.count(BEGIN) == mi300x.count(END) == 1
    assert mi300x == with_meanings(mi300x, pinned)
