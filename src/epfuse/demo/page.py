"""The demo's record as one HTML page."""

from __future__ import annotations

from epfuse.demo.checks import LAYER_HEADROOM
from epfuse.demo.record import DemoRecord
from epfuse.report.charts import grouped_bars, stacked_bars
from epfuse.report.page import render


def demo_page(record: DemoRecord) -> str:
    """A self-contained page: rows useful and padded per rank, error per layer, all checks."""
    most = float(max((max(layer.padded_rows) for layer in record.layers), default=0))
    rows = [
        stacked_bars(
            f"Rows per rank, {layer.label}",
            [str(rank) for rank in range(len(layer.useful_rows))],
            {
                "useful": [float(useful) for useful in layer.useful_rows],
                f"padding to {record.block_m}": [
                    float(padded - useful) for useful, padded in zip(layer.useful_rows, layer.padded_rows, strict=True)
                ],
            },
            top=most,
        )
        for layer in record.layers
    ]
    errors = grouped_bars(
        "Max absolute error against float64",
        [layer.label for layer in record.layers],
        {
            "sum over ranks": [layer.error for layer in record.layers],
            f"transformers in {record.settings['dtype']}": [layer.transformers_error for layer in record.layers],
            "allowed": [LAYER_HEADROOM * layer.transformers_error for layer in record.layers],
        },
    )
    run = sum(sum(layer.padded_rows) for layer in record.layers)
    tiled = sum(layer.global_rows * len(layer.padded_rows) for layer in record.layers)
    pairs = zip(record.text["tokens_by_ranks"], record.text["untouched_tokens"], strict=True)
    return render(
        "demo.html.j2",
        record=record,
        row_charts=rows,
        error_chart=errors,
        headroom=LAYER_HEADROOM,
        saving=tiled / run if run else 0.0,
        matching=sum(ours == theirs for ours, theirs in pairs),
    )
