"""Times tiles on the present device, and judges what they compute."""

from __future__ import annotations

from functools import partial

import torch

from epfuse.arguments import checks_enums
from epfuse.bench.inputs import Inputs, cache_bytes_of, draw_inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import QUICK, Method, Sampling, time_calls
from epfuse.bench.roofline import BYTES_PER_WEIGHT, Operand, Roofs, Work, floor_of
from epfuse.bench.roofs import measure_roofs
from epfuse.bench.routing import Kind, Routing
from epfuse.bench.weights import LayerWeights
from epfuse.policy.kernels import FP8_PATHS
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.tuning.calls import StageInputs, call_layer
from epfuse.tuning.schema import Stage
from epfuse.tuning.search import Point, Timed
from epfuse.verify.budget import Tolerance, compare, dense_tolerance, fp8_tolerance

SHARE = {Stage.GATE_UP: 2 / 3, Stage.DOWN: 1 / 3}
"""Each stage's part of an expert's weights."""


class DeviceBench:
    """A `search.Bench` on one device.

    A whole call is held against the float64 oracle; a stage against the same stage in tiles whose call passed. Results
    are read from memory that was filled with NaN before.

    Args:
        layer: sizes and activation.
        device: where.
        sampling: how much is measured.
        seed: of weights, activations and routings.
    """

    def __init__(self, layer: Layer, device: torch.device, sampling: Sampling = QUICK, seed: int = 0) -> None:
        self.layer_sizes = layer
        self.device = device
        self.weights = LayerWeights(layer, seed, device)
        self._sampling = sampling
        self._seed = seed
        self._method = Method.GRAPH if device.type == "cuda" else Method.PLAIN
        self._roofs: Roofs | None = None
        self._point: Point | None = None
        self._inputs: list[Inputs] = []
        self._oracles: list[torch.Tensor] = []
        self._stages: list[StageInputs] = []

    def layer(self, point: Point, tiles: LayerTiles) -> Timed:
        """A whole call; the first one at a point, if it is right, is what its stages are held against."""
        if point != self._point:
            self._draw(point)
        experts = self.weights.in_format(point.weights)
        activation = self.layer_sizes.activation
        calls = [
            partial(
                call_layer,
                point.path,
                point.weights,
                tiles,
                experts,
                inputs.hidden,
                inputs.topk_weights,
                inputs.topk_ids,
                inputs.expert_map,
                activation,
                torch.empty_like(inputs.hidden),
            )
            for inputs in self._inputs
        ]
        for call in calls:
            call()  # compiles
        measured = time_calls(calls, self.device, self._sampling, self._method)
        shape = self.layer_sizes.shape
        dense = dense_tolerance(torch.bfloat16, shape.hidden, shape.intermediate)
        tolerance = fp8_tolerance() if point.path in FP8_PATHS else dense
        fault = _fault(measured.outputs, self._oracles, tolerance, "the oracle")
        if fault is None and not self._stages:
            self._stages = [
                StageInputs.of(
                    point.path,
                    point.weights,
                    experts,
                    inputs.hidden,
                    inputs.topk_weights,
                    inputs.topk_ids,
                    inputs.expert_map,
                    activation,
                    tiles,
                )
                for inputs in self._inputs
            ]
        return Timed(measured.timing.median_us, fault)

    @checks_enums
    def stage(self, point: Point, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        """One stage alone; a call must have passed at this point before."""
        assert point == self._point
        assert self._stages
        calls = [inputs.bind(stage, block_m, tile) for inputs in self._stages]
        for call in calls:
            call()  # compiles
        measured = time_calls(calls, self.device, self._sampling, self._method)
        shape = self.layer_sizes.shape
        results, expected = [], []
        for inputs, output in zip(self._stages, measured.outputs, strict=True):
            right = inputs.gate_up if stage is Stage.GATE_UP else inputs.down
            results.append(inputs.rows_of(output, tile))
            expected.append(right[inputs.local_routes].double())
        tolerance = dense_tolerance(torch.bfloat16, shape.hidden, shape.intermediate)
        return Timed(measured.timing.median_us, _fault(results, expected, tolerance, "tiles that are right"))

    @checks_enums
    def floor_us(self, point: Point, stage: Stage) -> float:
        """From the device's own measured rates."""
        if self._roofs is None:
            self._roofs = measure_roofs(self.device, self._sampling)
        weights = self.layer_sizes.expert_weights * SHARE[stage]
        operand = Operand.FP8 if point.path in FP8_PATHS else Operand.BF16
        floors = [
            floor_of(
                Work(
                    len(inputs.active) * weights * BYTES_PER_WEIGHT[point.weights],
                    2.0 * inputs.rows * weights,
                    operand,
                ),
                self._roofs,
            ).seconds
            for inputs in self._inputs
        ]
        return 1e6 * sum(floors) / len(floors)

    def _draw(self, point: Point) -> None:
        cache = cache_bytes_of(self.device)
        self._inputs = draw_inputs(
            self.layer_sizes, Routing(Kind.UNIFORM), point.tokens, self._seed, self.device, cache
        )
        self._oracles = [self.weights.oracle(inputs) for inputs in self._inputs]
        self._stages = []
        self._point = point


def _fault(outputs: list[torch.Tensor], expected: list[torch.Tensor], tolerance: Tolerance, judge: str) -> str | None:
    """What is wrong with the worst result; None if all are right."""
    for output, oracle in zip(outputs, expected, strict=True):
        difference = compare(output, oracle)
        if not difference.within(tolerance):
            return (
                f"wrong: {difference.snr_db:.1f} dB from {judge}, of {tolerance.snr_db:.1f} needed; relative error"
                f" {difference.relative_error:.1e} of {tolerance.relative_error:.1e} allowed"
            )
    return None
