"""docs/models.md is what the rules say of the installed transformers, and of the newest release that was recorded."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tools.models_table import PAGE, newest_record, page, rows


def test_the_page_is_what_the_rules_say() -> None:
    found = rows()
    assert len(found) >= 64
    assert page(newest_record(), found) == PAGE.read_text(encoding="utf-8"), "run python tools/models_table.py"
