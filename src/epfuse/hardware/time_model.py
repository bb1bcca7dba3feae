"""A time model of one expert layer: what a call must move, multiply and launch, and how fast a machine does it.

Everything that comes out of here is **predicted**. A stage takes

    max(bytes / (eta * memory bandwidth), FLOPs / achieved rate, vector ALU clocks / all SIMDs' clocks) + launches * c

where the bytes are the weights of the experts that have a row, read once (row blocks of one expert run together and
share the caches), and the rows that go in and out; the FLOPs include padding. eta and c are a machine's, fitted to
measurements (`calibrate`) and stated with every prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from epfuse.config import LayerShape
from epfuse.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU.

    Attributes:
        name: the product.
        memory_bandwidth: peak, bytes a second.
        eta: part of it that the expert GEMMs reach; calibrated.
        matrix_flops: achieved FLOP/s of a large GEMM, by operand ("bf16", "fp8").
        launch_seconds: c, the time of a kernel beyond its bytes and FLOPs (launch, first and last programs);
            calibrated.
        simds: SIMDs of the GPU.
        clock_hz: of a SIMD.
        source: where the numbers are from.
    """

    name: str
    memory_bandwidth: float
    eta: float
    matrix_flops: dict[str, float]
    launch_seconds: float
    simds: int
    clock_hz: float
    source: str


MI300X = Machine(
    name="MI300X",
    memory_bandwidth=5.3e12,
    eta=0.57,
    matrix_flops={"bf16": 708e12, "fp8": 1273e12},
    launch_seconds=18e-6,
    simds=304 * 4,
    clock_hz=2.1e9,
    source="peak bandwidth, compute units and clock: AMD Instinct MI300X data sheet; achieved FLOP/s: published GEMM"
    " measurements; eta and launch_seconds: `calibrate` on the c1 and c256 points of published.BF16_POINTS",
)


@dataclass(frozen=True)
class RoutingModel:
    """How unevenly the router chooses experts.

    Attributes:
        skew: expert i (1, 2, ..) is chosen in proportion to i^-skew: 0 is a balanced router. Which rank holds which
            expert is taken as random, so every rank expects the same.
    """

    skew: float = 0.0

    def inclusion(self, shape: LayerShape) -> list[float]:
        """Probability of each of the E experts to be among a token's K: in proportion to its weight, at most 1."""
        weights = [rank**-self.skew for rank in range(1, shape.experts + 1)]
        certain = 0  # the heaviest experts that every token takes
        while True:
            factor = (shape.top_k - certain) / sum(weights[certain:])
            if weights[certain] * factor <= 1:
                return [1.0] * certain + [weight * factor for weight in weights[certain:]]
            certain += 1
            if certain == shape.top_k:
                return [1.0] * certain + [0.0] * (shape.experts - certain)

    def active_experts(self, shape: LayerShape, tokens: int) -> float:
        """Local experts that at least one of ``tokens`` tokens is expected to choose."""
        chosen = sum(1 - (1 - p) ** tokens for p in self.inclusion(shape))
        return chosen * shape.local_experts / shape.experts


BALANCED = RoutingModel()
MI300X_ROUTING = RoutingModel(skew=1.2)
"""Chosen for the c16 points: a balanced router would touch 6.4 of 16 experts at 16 tokens, whose weights could not have
been read in the time that was measured."""


@dataclass(frozen=True)
class Kernels:
    """What the model knows of a path's two GEMMs.

    Attributes:
        name: the path.
        weight_bytes: bytes of one weight, scales included.
        activation_bytes: bytes of one activation that a GEMM reads, scales included.
        operand: of the matrix instructions: "bf16" or "fp8".
        block_m: rows of a block.
        vector_clocks: vector ALU clocks of one weight of one row block, from the compiled inner loop, (gate_up, down);
            zero where it is not known.
    """

    name: str
    weight_bytes: float
    activation_bytes: float
    operand: str
    block_m: int
    vector_clocks: tuple[float, float] = (0.0, 0.0)


MXFP8_BYTES = 1 + 1 / 32
BLOCK_FP8_BYTES = 1 + 4 / 128**2
PATHS = {
    "bf16": Kernels("bf16", 2, 2, "bf16", 16),
    "w8a16": Kernels("w8a16", MXFP8_BYTES, 2, "bf16", 16),
    "w8a8": Kernels("w8a8", MXFP8_BYTES, MXFP8_BYTES, "fp8", 16),
    "block_fp8": Kernels("block_fp8", BLOCK_FP8_BYTES, 1 + 4 / 128, "fp8", 16),
    "seed-1782": Kernels("seed-1782", 2, 2, "bf16", 16),
}
"""What this package runs at the points' token counts, and the fused BF16 kernels of InferenceX pull request 1782."""
PROFILED_BF16 = Kernels("profiled bf16", 2, 2, "bf16", 64)
"""The BF16 experts of the profile: 64-row tiles."""
PROFILED_BLOCK_FP8 = Kernels("profiled block-fp8", BLOCK_FP8_BYTES, 1 + 4 / 128, "fp8", 64)
"""The profile's authors' later 128 x 128 block FP8 experts; the row block is taken to be as before."""


@dataclass(frozen=True)
class StageTime:
    """One stage of one layer, predicted.

    Attributes:
        stage: its name.
        bytes: moved to and from memory.
        flops: of the matrix instructions, padding included.
        memory_seconds, matrix_seconds, vector_seconds: what each would take alone.
        launch_seconds: of its launches.
    """

    stage: str
    bytes: float
    flops: float
    memory_seconds: float
    matrix_seconds: float
    vector_seconds: float
    launch_seconds: float

    @property
    def seconds(self) -> float:
        """The slowest of the three, and the launches."""
        return max(self.memory_seconds, self.matrix_seconds, self.vector_seconds) + self.launch_seconds

    @property
    def bound(self) -> str:
        """What the stage waits for."""
        terms = {"memory": self.memory_seconds, "matrix": self.matrix_seconds, "vector": self.vector_seconds}
        slowest = max(terms, key=lambda name: terms[name])
        return "launch" if self.launch_seconds > terms[slowest] else slowest


def expert_gemms(
    machine: Machine,
    kernels: Kernels,
    shape: LayerShape,
    tokens: int,
    routing: RoutingModel = BALANCED,
    inputs: int = 2,
) -> tuple[StageTime, StageTime]:
    """Predicted times of gate_up and down of one layer on one rank.

    Args:
        machine: where.
        kernels: which.
        shape: the layer's sizes.
        tokens: T, over all ranks: the tokens whose routes this rank sees.
        routing: how uneven the router is.
        inputs: of the activation: 2, or 1 for experts without a gate.

    Returns:
        gate_up, then down; times in seconds.

    Raises:
        ConfigError: tokens is below 1.
    """
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}; it must be at least 1")
    rows = tokens * shape.top_k * shape.local_experts / shape.experts
    active = routing.active_experts(shape, tokens)
    # an expert with rows has one block; one with many has half a block of padding on average
    blocks = max(active, rows / kernels.block_m + active / 2)
    projections = (
        ("gate_up", inputs * shape.intermediate, shape.hidden, shape.intermediate),
        ("down", shape.hidden, shape.intermediate, shape.hidden),
    )
    stages = []
    for (name, outputs, inputs, stored), clocks in zip(projections, kernels.vector_clocks, strict=True):
        weights = float(outputs * inputs)
        moved = active * weights * kernels.weight_bytes + rows * (inputs * kernels.activation_bytes + stored * 2)
        flops = 2 * blocks * kernels.block_m * weights
        stages.append(
            StageTime(
                stage=name,
                bytes=moved,
                flops=flops,
                memory_seconds=moved / (machine.eta * machine.memory_bandwidth),
                matrix_seconds=flops / machine.matrix_flops[kernels.operand],
                vector_seconds=blocks * weights * clocks / (machine.simds * machine.clock_hz),
                launch_seconds=machine.launch_seconds,
            )
        )
    return stages[0], stages[1]


def predicted_ms(
    machine: Machine,
    kernels: Kernels,
    shape: LayerShape,
    tokens: int,
    routing: RoutingModel = BALANCED,
    layers: int = 1,
    inputs: int = 2,
) -> float:
    """Predicted milliseconds of both GEMMs over ``layers`` layers.

    Args:
        machine: the GPU.
        kernels: the path's.
        shape: one rank's layer.
        tokens: T.
        routing: how uneven the router is.
        layers: how many layers.
        inputs: of the activation: 2, or 1 for experts without a gate.

    Raises:
        ConfigError: tokens is below 1.
    """
    return 1e3 * layers * sum(stage.seconds for stage in expert_gemms(machine, kernels, shape, tokens, routing, inputs))


@dataclass(frozen=True)
class MeasuredTime:
    """A measured time to hold a prediction against.

    Attributes:
        name: of the point.
        kernels: what ran.
        tokens: T.
        milliseconds: of both GEMMs over ``layers`` layers.
        layers: how many layers that is.
    """

    name: str
    kernels: Kernels
    tokens: int
    milliseconds: float
    layers: int = 1


@dataclass(frozen=True)
class Comparison:
    """One measurement beside its prediction.

    Attributes:
        measurement: what was measured.
        predicted_ms: what the model says.
    """

    measurement: MeasuredTime
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative error of the prediction: 0.1 is 10 % too slow."""
        return self.predicted_ms / self.measurement.milliseconds - 1


def compare(
    machine: Machine, shape: LayerShape, measurements: Iterable[MeasuredTime], routing: RoutingModel = BALANCED
) -> list[Comparison]:
    """Every measurement with its prediction.

    Args:
        machine: that they are from.
        shape: one rank's layer.
        measurements: of it.
        routing: how uneven the router was.

    Raises:
        ConfigError: a measurement's tokens are below 1.
    """
    return [Comparison(m, predicted_ms(machine, m.kernels, shape, m.tokens, routing, m.layers)) for m in measurements]


def mean_error(comparisons: Sequence[Comparison]) -> float:
    """Mean of the errors' magnitudes."""
    return sum(abs(comparison.error) for comparison in comparisons) / len(comparisons)


def calibrate(
    machine: Machine, shape: LayerShape, measurements: Sequence[MeasuredTime], routing: RoutingModel = BALANCED
) -> Machine:
    """``machine`` with the eta and the launch time that fit ``measurements`` best.

    Least squares of the relative errors of ``t = bytes / (eta * bandwidth) + launches * c``, so the measurements must
    be bound by memory.

    Args:
        machine: whose other numbers are known.
        shape: one rank's layer.
        measurements: of it, at least two.
        routing: how uneven the router was.

    Raises:
        ConfigError: they don't determine both: all have the same ratio of bytes to launches.
    """
    # rows (u, v) of u * p + v * c = 1, with p = 1 / eta
    uu = uv = vv = u1 = v1 = 0.0
    for m in measurements:
        stages = expert_gemms(machine, m.kernels, shape, m.tokens, routing)
        seconds = m.milliseconds * 1e-3 / m.layers
        u = sum(stage.bytes for stage in stages) / machine.memory_bandwidth / seconds
        v = len(stages) / seconds
        uu, uv, vv, u1, v1 = uu + u * u, uv + u * v, vv + v * v, u1 + u, v1 + v
    determinant = uu * vv - uv * uv
    if math.isclose(determinant, 0, abs_tol=1e-9 * uu * vv):
        raise ConfigError("the measurements have one ratio of bytes to launches; eta and c can't be told apart")
    return replace(
        machine,
        eta=determinant / (u1 * vv - v1 * uv),
        launch_seconds=(v1 * uu - u1 * uv) / determinant,
    )
