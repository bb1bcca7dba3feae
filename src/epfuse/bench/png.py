"""The curves as PNG, for places that show no SVG. Needs matplotlib."""

from __future__ import annotations

import io

from epfuse.bench.charts import CurveChart
from epfuse.errors import MissingDependency

COLOURS: dict[str, tuple[str, ...]] = {
    "path": ("#1f66b8", "#d2620a", "#21845a", "#7a4bc4", "#c02f57", "#0c8393"),
    "peer": ("#8a6d3b", "#6b7480", "#93679b", "#5d8a7a", "#a35f5f", "#7d7a35"),
    "floor": ("#3c434b",) * 6,
}
DASHES = ("--", ":", "-.", (0, (8, 4)), (0, (5, 2)), (0, (3, 1)))


def chart_png(chart: CurveChart) -> bytes:
    """One chart as a PNG file.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("PNG pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for curve in chart.curves:
        kind, index = curve.style[:-1], int(curve.style[-1])
        x, y = [point.x for point in curve.points], [point.y for point in curve.points]
        if curve.is_floor:
            axes.plot(x, y, color=COLOURS[kind][index], linestyle=DASHES[index], linewidth=1, label=curve.name)
            continue
        errors = [[p.y - p.low for p in curve.points], [p.high - p.y for p in curve.points]]
        marker = "o" if kind == "path" else "s"
        axes.errorbar(x, y, yerr=errors, color=COLOURS[kind][index], marker=marker, markersize=4, label=curve.name)
    axes.set(title=chart.title, xlabel="tokens", ylabel=chart.unit, xscale="log")
    axes.set_yscale("log" if chart.y.logarithmic else "linear")
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_ylim(chart.y.low, chart.y.high)
    axes.set_xticks(chart.x.ticks, [chart.x.label(tick) for tick in chart.x.ticks])
    axes.set_yticks(chart.y.ticks, [chart.y.label(tick) for tick in chart.y.ticks])
    axes.minorticks_off()
    axes.grid(visible=True, axis="y", linewidth=0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
