from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuning.tables import reading


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that calls read their tables from."""
    with reading(tmp_path, monkeypatch):
        yield tmp_path
