"""One layer's weights, the same numbers in every format that is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from epfuse.arguments import checks_enums
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import Layer
from epfuse.config import Bias, WeightFormat
from epfuse.numerics.mxfp8 import BLOCK, MXFP8
from epfuse.target import target_of
from epfuse.verify.experts import in_format
from epfuse.verify.oracle import add_experts, plain_numbers
from epfuse.verify.scenarios import Scenario
from epfuse.weights.dense import DenseExperts
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.mxfp8 import MXFP8Experts


class LayerWeights:
    """Random experts of this rank; a unit-variance input leaves each projection with unit variance.

    They are MXFP8 numbers if the sizes allow it, and their BF16 copy is exact, so every path and every peer computes
    the same layer. (Block FP8 is converted from them, which is not exact; its tolerance covers that.)

    Args:
        layer: sizes.
        seed: of the weights.
        device: where they live.
        say: called with what begins, where it may take seconds: weights are made when they are first asked for.
    """

    def __init__(
        self, layer: Layer, seed: int, device: torch.device, say: Callable[[str], None] = lambda what: None
    ) -> None:
        self.layer = layer
        self.device = device
        self._seed = seed
        self._say = say
        self._made: dict[WeightFormat, ExpertWeights] = {}

    @property
    def quantised(self) -> bool:
        """Whether H and I are multiples of MXFP8's block."""
        return self.layer.shape.hidden % BLOCK == 0 and self.layer.shape.intermediate % BLOCK == 0

    @cached_property
    def source(self) -> ExpertWeights:
        """As a checkpoint has them: MXFP8, or BF16 if the sizes are no multiples of its block."""
        self._say(f"making weights of {self.layer.name}")
        drawn = self._draw_mxfp8() if self.quantised else self._draw_dense()
        return ExpertWeights(drawn.formats, *self._biases())

    @property
    def mxfp8(self) -> MXFP8Experts:
        """The source where it is MXFP8 (`quantised`)."""
        packed = self.source.mxfp8_experts
        assert packed is not None
        return packed

    @property
    def dense(self) -> DenseExperts:
        """`in_format` BF16."""
        dense = self.in_format(WeightFormat.DENSE).dense_experts
        assert dense is not None
        return dense

    @checks_enums
    def in_format(self, form: WeightFormat) -> ExpertWeights:
        """The weights in ``form`` alone, made once and kept."""
        if form not in self._made:
            if form in self.source.kept:
                self._made[form] = self.source
                return self.source
            self._say(f"rearranging weights of {self.layer.name}: {form.value}")
            if form is WeightFormat.DENSE:
                made = self._dequantised()
            else:
                made = in_format(self.source, form, target_of(self.device))
            self._made[form] = made
        return self._made[form]

    def oracle(self, inputs: Inputs) -> torch.Tensor:
        """``[T, H]`` float64, rounded nowhere, of one call; shares no code with what is timed."""
        total = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=self.device)
        call = Scenario("bench", inputs.hidden, inputs.topk_weights, inputs.topk_ids)
        packed, dense = self.source.mxfp8_experts, self.source.dense_experts
        for slot in inputs.active:  # the measured rank is the first: its slots are global ids
            if packed is not None:
                w13, w2 = (plain_numbers(stack[slot])[None] for stack in (packed.w13, packed.w2))
            else:
                assert dense is not None
                w13, w2 = dense.w13[slot : slot + 1], dense.w2[slot : slot + 1]
            own = {name: bias[slot : slot + 1] for name, bias in self.source.biases}
            add_experts(total, slot, w13, w2, call, self.layer.activation, **own)
        return total

    def _draw_mxfp8(self) -> ExpertWeights:
        stacks = []
        for shape in self._shapes():
            values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
            scales = torch.empty(*shape[:-1], shape[-1] // BLOCK, dtype=torch.uint8, device=self.device)
            stacks.append(MXFP8(values, scales))
        rng = self._generator()
        for stack in stacks:
            for slot in range(self.layer.shape.local_experts):
                packed = MXFP8.quantize(self._matrix(stack.values.shape, rng))
                stack.values[slot].copy_(packed.values)
                stack.scales[slot].copy_(packed.scales)
        w13, w2 = stacks
        return ExpertWeights.mxfp8(w13.values, w13.scales, w2.values, w2.scales)

    def _draw_dense(self) -> ExpertWeights:
        stacks = [torch.empty(shape, dtype=torch.bfloat16, device=self.device) for shape in self._shapes()]
        rng = self._generator()
        for stack in stacks:
            for slot in range(self.layer.shape.local_experts):
                stack[slot].copy_(self._matrix(stack.shape, rng))
        return ExpertWeights.bf16(*stacks)

    def _dequantised(self) -> ExpertWeights:
        stacks = [torch.empty(shape, dtype=torch.bfloat16, device=self.device) for shape in self._shapes()]
        for stack, source in zip(stacks, (self.mxfp8.w13, self.mxfp8.w2), strict=True):
            for slot in range(stack.shape[0]):  # one by one: the float32 copy in between is one expert's
                stack[slot].copy_(source[slot].dequantize(torch.bfloat16))
        return ExpertWeights(ExpertWeights.bf16(*stacks).formats, *self._biases())

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._seed)

    def _biases(self) -> list[torch.Tensor]:
        """Float32 that BF16 holds, as checkpoints have them: gate_up's and down's, the same at each call, or none."""
        if self.layer.bias is Bias.NONE:
            return []
        rng = torch.Generator(self.device).manual_seed(self._seed + 1)
        rows = [shape[:2] for shape in self._shapes()]
        return [torch.randn(size, generator=rng, device=self.device).bfloat16().float() for size in rows]

    def _matrix(self, stack: torch.Size, rng: torch.Generator) -> torch.Tensor:
        """``[N, K]`` float32, the next expert's."""
        _, rows, columns = stack
        return torch.randn(rows, columns, generator=rng, device=self.device).mul_(columns**-0.5)

    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        shape = self.layer.shape
        local = shape.local_experts
        return (local, 2 * shape.intermediate, shape.hidden), (local, shape.hidden, shape.intermediate)
