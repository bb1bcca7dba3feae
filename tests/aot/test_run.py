"""Compiling processes that die."""

from __future__ import annotations

import pytest

from epfuse import Path, Target
from epfuse.aot import run
from epfuse.errors import CompilerDied
from tests import jobs


def test_a_target_whose_kernels_could_not_be_listed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "list_jobs", jobs.killed)
    request = run.CompileRequest((Target.GFX950,), ("route",), (Path.BF16,), ("minimax-m3",), ("bf16",), workers=1)
    with pytest.raises(CompilerDied, match="the kernels of gfx950 could not be listed: the process that did it died"):
        run.run(request, lambda done, total: None)
