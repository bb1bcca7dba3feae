"""Tables that tests share."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import pytest

from epfuse import LayerShape, Path, Target
from epfuse.config import WeightFormat
from epfuse.families.family import Stage
from epfuse.measured import store
from epfuse.measured.schema import Measurement, TileRow
from epfuse.policy import auto, call, ranges
from epfuse.stages.tiles import GemmTile

M3 = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4)
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def row(tokens: int, block_m: int = 16, microseconds: float = 10.0, block_n: int = 64, **changes: Any) -> TileRow:
    tile = GemmTile(block_n=block_n, block_k=128, group_m=0, num_warps=4, num_stages=2)
    values = {"tokens": tokens, "block_m": block_m, "tile": tile, "microseconds": microseconds, "roofline": 0.5}
    return TileRow(**(values | changes))


def measurement(*rows: TileRow, shape: LayerShape = M3, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "device": H100,
        "path": Path.BF16,
        "weights": WeightFormat.DENSE,
        "shape": shape,
        "torch": "2.11.0",
        "triton": "3.6.0",
        "date": datetime.date(2026, 11, 24),
        "source": "epfuse tune",
        "rows": rows,
    }
    return Measurement(**(values | changes))


def write(folder: FilePath, *measurements: Measurement, target: Target = Target.SM90) -> None:
    """Each measurement for both stages."""
    for entry in measurements:
        store.merge(folder, target, dict.fromkeys(Stage, entry))


@contextmanager
def reading(folder: FilePath, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls read the tables in ``folder``."""
    monkeypatch.setattr(store, "TABLES", folder)
    _forget()
    yield
    _forget()


def _forget() -> None:
    store.shipped.cache_clear()
    call.call_table.cache_clear()
    call.table_of.cache_clear()
    ranges._ranges.cache_clear()
    auto._gains.cache_clear()
