"""Every record that a page names is there: one that was replaced under another name leaves no link behind."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_records_that_pages_name_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"records/([\w.-]+\.json)", page.read_text())}
    assert len(named) > 30
    assert [(page, name) for page, name in sorted(named) if not (ROOT / "docs" / "records" / name).exists()] == []
