"""`python -m tools.beside_vllm` writes what `epfuse plan` knows of measured times beside vLLM's experts.

The rows are copied from docs/records: runs that timed epfuse and a class of vLLM's experts on one card, one after the
other, on the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epfuse.bench.layers import LAYERS
from epfuse.report.write import write_atomic

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"
OUT = ROOT / "src" / "epfuse" / "planning" / "beside_vllm.json"
EXPERTS = {
    "humming_w8a16_grouped": "HummingGroupedExperts",
    "humming_w8a16_indexed": "HummingIndexedExperts",
    "vllm_marlin_tuned": "MarlinExperts",
}
"""Peer of the harness -> the class of vLLM's that runs those kernels."""
OURS = "impl"


def rows() -> list[dict[str, Any]]:
    """Every row of the records that has both times, at even routing."""
    return [row for name, run in runs() for row in pairs(name, run)]


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Record and run of every record with a layer's name."""
    for file in sorted(RECORDS.glob("*-peers.json")) + sorted(RECORDS.glob("*-other-layers.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for run in record.get("layers", [record]):
            if run.get("layer") in LAYERS and run["routing"] == "uniform":
                yield file.name, {"device": record["device"], **run}


def pairs(name: str, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one run, one a token count and peer."""
    ours = {row["T"]: row["us"] for row in run["rows"] if row["peer"] == OURS}
    for row in run["rows"]:
        if row["peer"] in EXPERTS and row.get("best", True) and row["T"] in ours:
            yield {
                "record": name,
                "device": run["device"],
                "shape": asdict(LAYERS[run["layer"]].shape),
                "experts": EXPERTS[row["peer"]],
                "path": "w8a16",
                "tokens": row["T"],
                "ours_us": round(ours[row["T"]], 2),
                "theirs_us": round(row["us"], 2),
                "active": row["act"],
            }


def text() -> str:
    """The file, one row a line."""
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows()) + "\n]\n"


if __name__ == "__main__":
    write_atomic(OUT, text())
