"""Draw a record of the peers' harness: the layer's time over the token count, ours, the peers' and the floor.

    python -m tools.draw_peers docs/records/2026-11-25-h100-peers.json docs/performance-h100.svg

The floor is the larger of the active experts' MXFP8 bytes at the card's read rate and the rows' FLOPs at its BF16
matmul rate, both as the harness measured them in the same run.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from epfuse.bench.charts import ChartPoint, Curve, CurveChart, time_axis, tokens_axis
from epfuse.bench.page import chart_svg
from epfuse.cli.delivery import Delivery
from epfuse.cli.exits import PlainCommand
from epfuse.errors import ConfigError, first_fault
from epfuse.input_file import read_json
from epfuse.report.write import write_atomic

OURS = {
    "impl": "epfuse w8a16",
    "impl_w8a8": "epfuse w8a8",
    "impl_bf16": "epfuse bf16",
    "impl_block_fp8": "epfuse block_fp8",
}
PEERS = {
    "humming_w8a16_indexed": "humming, indexed",
    "humming_w8a16_grouped": "humming, grouped",
    "vllm_marlin_tuned": "vLLM Marlin, best tiles",
    "triton_kernels_bf16": "triton_kernels, BF16",
}


Rate = Annotated[float, Field(ge=1e-9, le=1e12)]
"""Or a time in microseconds: what a chart can show."""


class _PeerEntry(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _PeerRow(_PeerEntry):
    peer: str
    T: Annotated[int, Field(ge=1, le=1 << 30)]
    us: Rate
    tbs: Annotated[float, Field(ge=0, le=1e9)]
    tflops: Annotated[float, Field(ge=0, le=1e9)]
    best: bool


class _Record(_PeerEntry):
    """What the chart reads of a record; there is more in it."""

    device: str
    read_tb_s: Rate
    bf16_tflop_s: Rate
    rows: Annotated[list[_PeerRow], Field(min_length=1)]


@click.command(cls=PlainCommand)
@click.argument("record", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
def main(record: Path, picture: Path) -> None:
    """Write PICTURE from RECORD."""
    delivery = Delivery({"PICTURE": picture})
    drawn = chart_svg(chart_of(read_json(record, "record")))
    with delivery.of("PICTURE"):
        write_atomic(picture, drawn)
    delivery.exit(passed=True)


def check_rows(rows: Any) -> list[dict[str, Any]]:
    """The rows of a harness, as they are.

    Raises:
        ConfigError: they are none; the message says where it goes wrong.
    """
    _checked(TypeAdapter(list[_PeerRow]), rows)
    return list(rows)


def _checked(kind: TypeAdapter[Any], values: Any) -> None:
    try:
        kind.validate_python(values)
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"this is no record of the peers' harness: {place}: {fault}") from None


def chart_of(record: dict[str, Any]) -> CurveChart:
    """The chart of a record: the best configuration of each kernel.

    Raises:
        ConfigError: it is no record of the harness.
    """
    _checked(TypeAdapter(_Record), record)
    best = sorted((row for row in record["rows"] if row["best"]), key=itemgetter("peer", "T"))
    peers = {peer: list(rows) for peer, rows in groupby(best, key=itemgetter("peer"))}
    styled = [(f"path{index}", *one) for index, one in enumerate(OURS.items())]
    styled += [(f"peer{index}", *one) for index, one in enumerate(PEERS.items(), 1)]
    curves = [
        _curve(name, style, [(row["T"], row["us"]) for row in peers[peer]])
        for style, peer, name in styled
        if peer in peers
    ]
    curves.append(_curve("floor of MXFP8 weights", "floor0", [(row["T"], _floor_us(row, record)) for row in best]))
    counts = [row["T"] for row in best]
    times = [point.y for curve in curves for point in curve.points]
    title = f"One expert-parallel rank of MiniMax-M3 on {record['device']}"
    return CurveChart("peers", title, "µs", curves, tokens_axis(counts), time_axis(times))


def _curve(name: str, style: str, values: list[tuple[int, float]]) -> Curve:
    points = [
        ChartPoint(tokens, us, us, us, f"{name}, {tokens} tokens: {us:.1f} µs") for tokens, us in sorted(set(values))
    ]
    return Curve(name, style, points)


def _floor_us(row: dict[str, Any], record: dict[str, Any]) -> float:
    """From the harness's own columns: tbs, the active experts' bytes over the time, and tflops, the rows' FLOPs."""
    memory = row["us"] * row["tbs"] / record["read_tb_s"]
    matmul = row["us"] * row["tflops"] / record["bf16_tflop_s"]
    return float(f"{max(memory, matmul):.4g}")


if __name__ == "__main__":
    main()
