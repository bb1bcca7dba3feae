"""Draw a record of the peers' harness: the layer's time over the token count, ours, the peers' and the floor.

    python -m tools.draw_peers docs/records/2026-11-25-h100-peers.json docs/performance-h100.svg

The floor is the larger of the active experts' MXFP8 bytes at the card's read rate and the rows' FLOPs at its BF16
matmul rate, both as the harness measured them in the same run.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from epfuse.bench.charts import Curve, CurveChart, Point, time_axis, tokens_axis
from epfuse.bench.page import chart_svg
from epfuse.report.write import write_atomic

NAMES = {
    "impl": "epfuse w8a16",
    "humming_w8a16_indexed": "humming, indexed",
    "humming_w8a16_grouped": "humming, grouped",
    "vllm_marlin_tuned": "vLLM Marlin, best tiles",
    "triton_kernels_bf16": "triton_kernels, BF16",
}


def main(record: str, picture: str) -> None:
    """Write ``picture`` from ``record``."""
    try:
        drawn = chart_svg(chart_of(json.loads(Path(record).read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{record} is no record of the peers' harness: {type(error).__name__}: {error}")
    write_atomic(Path(picture), drawn)


def chart_of(record: dict[str, Any]) -> CurveChart:
    """The chart of a record: the best configuration of each kernel."""
    best = sorted((row for row in record["rows"] if row["best"]), key=itemgetter("peer", "T"))
    peers = {peer: list(rows) for peer, rows in groupby(best, key=itemgetter("peer"))}
    curves = [
        _curve(name, f"peer{index}" if index else "path0", [(row["T"], row["us"]) for row in peers[peer]])
        for index, (peer, name) in enumerate(NAMES.items())
        if peer in peers
    ]
    curves.append(_curve("floor of MXFP8 weights", "floor0", [(row["T"], _floor_us(row, record)) for row in best]))
    counts = [row["T"] for row in best]
    times = [point.y for curve in curves for point in curve.points]
    title = f"One expert-parallel rank of MiniMax-M3 on {record['device']}"
    return CurveChart("peers", title, "µs", curves, tokens_axis(counts), time_axis(times))


def _curve(name: str, style: str, values: list[tuple[int, float]]) -> Curve:
    points = [Point(tokens, us, us, us, f"{name}, {tokens} tokens: {us:.1f} µs") for tokens, us in sorted(set(values))]
    return Curve(name, style, points)


def _floor_us(row: dict[str, Any], record: dict[str, Any]) -> float:
    """From the harness's own columns: tbs, the active experts' bytes over the time, and tflops, the rows' FLOPs."""
    memory = row["us"] * row["tbs"] / record["read_tb_s"]
    matmul = row["us"] * row["tflops"] / record["bf16_tflop_s"]
    return float(f"{max(memory, matmul):.4g}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python -m tools.draw_peers RECORD PICTURE; {len(sys.argv) - 1} arguments given")
    main(sys.argv[1], sys.argv[2])
