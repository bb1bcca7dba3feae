"""Times tiles on the present device, and judges what they compute."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epfuse.arguments import checks_enums
from epfuse.bench.inputs import Inputs, cache_bytes_of, draw_inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import QUICK, Sampling, TimingMethod, time_calls
from epfuse.bench.roofline import CallWork, MatrixOperand, Roofs, floor_of
from epfuse.bench.roofs import measure_roofs
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.bench.weights import LayerWeights
from epfuse.families.family import LayerCall, Stage
from epfuse.families.registry import FP8_PATHS
from epfuse.stages.tiles import GemmTile, LayerTiles
from epfuse.tuning.calls import bind_layer, bind_stage, layer_call
from epfuse.tuning.search import Timed, TuningPoint
from epfuse.verify.budget import compare, dense_tolerance, fp8_tolerance
from epfuse.weights.formats import BYTES_PER_WEIGHT

SHARE = {Stage.GATE_UP: 2 / 3, Stage.DOWN: 1 / 3}
"""Each stage's part of an expert's weights."""


class DeviceBench:
    """A `search.TileBench` on one device.

    Every call is held against the float64 oracle, also that of a stage that is timed alone. Results are read from
    memory that was filled with NaN before.

    Args:
        layer: sizes and activation.
        device: where.
        sampling: how much is measured.
        seed: of weights, activations and routings.
        say: called with what begins, where it may take seconds.
    """

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        sampling: Sampling = QUICK,
        seed: int = 0,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.layer_sizes = layer
        self.device = device
        self.weights: LayerWeights = LayerWeights(layer, seed, device, say)
        self._sampling = sampling
        self._seed = seed
        self._method = TimingMethod.GRAPH if device.type == "cuda" else TimingMethod.PLAIN
        self._roofs: Roofs | None = None
        self._point: TuningPoint | None = None
        self._inputs: list[Inputs] = []
        self._oracles: list[torch.Tensor] = []
        self._calls: list[LayerCall] = []

    def layer(self, point: TuningPoint, tiles: LayerTiles) -> Timed:
        """A whole call."""
        calls = [bind_layer(point.path, point.weights, tiles, call) for call in self._calls_at(point)]
        for call in calls:
            call()  # compiles
        measured = time_calls(calls, self.device, self._sampling, self._method)
        return Timed(measured.timing.median_us, self._fault(point, measured.outputs))

    @checks_enums
    def stage(self, point: TuningPoint, stage: Stage, block_m: int, tile: GemmTile) -> Timed:
        """One stage alone, after a whole call in the same tile."""
        tiles, calls = LayerTiles(block_m, tile, tile), self._calls_at(point)
        for call in calls:
            call.out.fill_(torch.nan)
        stages = [bind_stage(point.path, point.weights, tiles, call, stage) for call in calls]
        fault = self._fault(point, [call.out for call in calls])
        measured = time_calls(stages, self.device, self._sampling, self._method)
        return Timed(measured.timing.median_us, fault)

    @checks_enums
    def floor_us(self, point: TuningPoint, stage: Stage) -> float:
        """From the device's own measured rates."""
        if self._roofs is None:
            self._roofs = measure_roofs(self.device, self._sampling)
        weights = self.layer_sizes.expert_weights * SHARE[stage]
        operand = MatrixOperand.FP8 if point.path in FP8_PATHS else MatrixOperand.BF16
        floors = [
            floor_of(
                CallWork(
                    len(inputs.active) * weights * BYTES_PER_WEIGHT[point.weights],
                    2.0 * inputs.rows * weights,
                    operand,
                ),
                self._roofs,
            ).seconds
            for inputs in self._inputs
        ]
        return 1e6 * sum(floors) / len(floors)

    def _calls_at(self, point: TuningPoint) -> list[LayerCall]:
        """The operands of the calls that are timed in turn."""
        if point != self._point:
            routing, cache = Routing(RoutingKind.UNIFORM), cache_bytes_of(self.device)
            self._inputs = draw_inputs(self.layer_sizes, routing, point.tokens, self._seed, self.device, cache)
            self._oracles = [self.weights.oracle(inputs) for inputs in self._inputs]
            experts, activation = self.weights.in_format(point.weights), self.layer_sizes.activation
            self._calls = [
                layer_call(
                    point.weights,
                    experts,
                    inputs.hidden,
                    inputs.topk_weights,
                    inputs.topk_ids,
                    inputs.expert_map,
                    activation,
                )
                for inputs in self._inputs
            ]
            self._point = point
        return self._calls

    def _fault(self, point: TuningPoint, outputs: list[torch.Tensor]) -> str | None:
        """What is wrong with the worst result; None if all are right."""
        shape = self.layer_sizes.shape
        dense = dense_tolerance(torch.bfloat16, shape.hidden, shape.intermediate)
        tolerance = fp8_tolerance() if point.path in FP8_PATHS else dense
        for output, oracle in zip(outputs, self._oracles, strict=True):
            difference = compare(output, oracle)
            if not difference.within(tolerance):
                return (
                    f"wrong: {difference.snr_db:.1f} dB from the oracle, of {tolerance.snr_db:.1f} needed; relative"
                    f" error {difference.relative_error:.1e} of {tolerance.relative_error:.1e} allowed"
                )
        return None
