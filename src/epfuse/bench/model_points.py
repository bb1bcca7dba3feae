"""A record as points of the time model (`epfuse.hardware.time_model`)."""

from __future__ import annotations

from dataclasses import replace

from epfuse.bench.contender import ContenderKind
from epfuse.bench.measure import TimingMethod
from epfuse.bench.record import BenchRecord
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.errors import ConfigError
from epfuse.hardware import time_model as model


def routing_of(text: str) -> model.RoutingModel:
    """The model's word for a record's routing.

    Raises:
        ConfigError: the model knows no such routing.
    """
    routing = Routing.parse(text)
    if routing.kind is RoutingKind.ALL_TO:
        raise ConfigError(f"routing is {text!r}; the time model knows uniform and zipf:S")
    return model.RoutingModel(skew=routing.parameter)


def measurements(record: BenchRecord, routing: str = "uniform") -> list[model.MeasuredTime]:
    """What ``model.compare`` and ``model.calibrate`` take: the graph-timed rows of the paths that the model knows.

    The times are the whole layer's, from ids to the sum over routes; the model's are the two GEMMs'. What routing and
    the sum take (a few microseconds) is in the difference.

    Args:
        record: of a GPU.
        routing: one of the record's.
    """
    return [
        model.MeasuredTime(
            name=f"{row.label}, T={row.tokens}",
            kernels=replace(model.PATHS[row.contender], block_m=row.block_m),
            tokens=row.tokens,
            milliseconds=row.time.median_us / 1e3,
        )
        for row in record.rows
        if row.kind is ContenderKind.PATH
        and row.routing == routing
        and row.contender in model.PATHS
        and row.block_m is not None
        and row.time is not None
        and row.time.method == TimingMethod.GRAPH.value
    ]
