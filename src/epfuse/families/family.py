"""What a family of kernels is: the questions that policy, api, tuner, bench and the compiler's gates ask of each."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Activation, Bias, Combine, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.families.blocks import powers_of_two
from epfuse.scratch import Scratch, ScratchSize
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile, LayerTiles, TileRange
from epfuse.target import REFERENCE_DEVICE, Target

Step: TypeAlias = tuple[str, Callable[[], object]]
"""A stage's name, as profiles show it, and its launch."""
Reads: TypeAlias = Mapping[Target, Mapping[Path, tuple[WeightFormat, ...]]]
"""Target -> path -> the weights that kernels read, best first."""


class Steps(NamedTuple):
    """What a call launches, in order.

    Attributes:
        table: of the routes; the first launch fills it. None where no kernel reads one.
        launches: each may run again; what shares a reduction wants the table's arrivals cleared before.
    """

    table: RouteTable | None
    launches: tuple[Step, ...]


class Stage(enum.Enum):
    """The stages that have tiles of their own: the two grouped GEMMs."""

    GATE_UP = "gate_up"
    DOWN = "down"


@checks_enums
@dataclass(frozen=True)
class CallKind:
    """What decides which kernels run the calls of a layer: all but the number of tokens.

    Attributes:
        path: what callers ask for; AUTO and REFERENCE are for the policy, which settles them.
        target: where the calls run.
        shape: the layer's sizes.
        formats: the weights that are kept.
        dtype: of the activations.
        combine: how routes are summed; ATOMIC leaves the paths with FP8 activations.
        activation: between the two GEMMs; its parameters are arguments at run time.
        bias: whether the projections have one.
        device_name: the product, as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
    """

    path: Path
    target: Target
    shape: LayerShape
    formats: frozenset[WeightFormat] = frozenset({WeightFormat.DENSE})
    dtype: torch.dtype = torch.bfloat16
    combine: Combine = Combine.DETERMINISTIC
    activation: type[Activation] = SwiGLUOAI
    bias: Bias = Bias.NONE
    device_name: str | None = None

    @property
    def device(self) -> str:
        """The product that runs the calls."""
        return self.device_name or REFERENCE_DEVICE[self.target]

    @property
    def form(self) -> WeightFormat:
        """The weights that the kernels read, where one format is left to choose from."""
        (form,) = self.formats
        return form

    @checks_enums
    def on(self, path: Path, form: WeightFormat) -> CallKind:
        """The calls on one path that read one format: what families are asked about."""
        return replace(self, path=path, formats=frozenset({form}))


class LayerCall(NamedTuple):
    """The operands of one call, checked.

    Attributes:
        hidden: ``[T, H]``.
        w13: ``[L, 2I, H]`` in a format that the family reads; ``[L, I, H]`` where the activation has no gate.
        w2: ``[L, H, I]`` in the same format.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32 or int64.
        slots: ``[E]`` int32, local slot or -1.
        shape: the layer's sizes.
        activation: between the two GEMMs.
        combine: how a token's routes are summed.
        out: ``[T, H]``, the result.
        scratch: memory for the rows between the stages; None to allocate.
        gate_up_bias: ``[L, 2I]`` or ``[L, I]`` float32; None for none.
        down_bias: ``[L, H]`` float32; None for none.
    """

    hidden: torch.Tensor
    w13: Any
    w2: Any
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    slots: torch.Tensor
    shape: LayerShape
    activation: Activation
    combine: Combine
    out: torch.Tensor
    scratch: Scratch | None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def routes(self) -> int:
        """R = T*K."""
        return self.topk_ids.numel()

    def table(self, block_m: int, arrivals_per_block: int = 0) -> RouteTable:
        """Memory for the call's routes."""
        return RouteTable.empty(self.routes, self.shape.local_experts, block_m, self.hidden.device, arrivals_per_block)


class Family(ABC):
    """Kernels that go together: a call runs on one family from its first step to its last.

    The docstring of a family begins with the names of its steps, ``route -> gate_up -> down -> combine``.

    Attributes:
        name: in one word.
        reads: target -> path -> the weights that the kernels read, best first.
        tile: class of its tiles. Of families that read the same weights a call's tiles tell which one runs.
        combines: how it can sum a token's routes.
        beside_fp8: dtypes of the activations that it takes beside weights in FP8.
        activations: what it has device code for (`epfuse.stages.activation`).
        biases: whether its projections add biases.
        least_block_m: rows of its smallest block.
        every_gpu: whether it gives way where a GPU has kernels of its own for the same weights.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads]
    tile: ClassVar[type[GemmTile]]
    combines: ClassVar[frozenset[Combine]] = frozenset({Combine.DETERMINISTIC})
    beside_fp8: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16})
    activations: ClassVar[frozenset[type[Activation]]] = frozenset({SwiGLUOAI})
    biases: ClassVar[frozenset[Bias]] = frozenset({Bias.NONE})
    least_block_m: ClassVar[int] = 16
    every_gpu: ClassVar[bool] = False

    def accepts(self, kind: CallKind) -> str | None:
        """Why calls can't run on this family, in a sentence; None if they can.

        Args:
            kind: of the calls, on one path and one format.
        """
        target, path, form = kind.target, kind.path, kind.form
        if form not in self.readable(target, path):
            return f"{self.name} has no kernel for {target.value} that reads {form.value} weights on {path.value}."
        if kind.combine not in self.combines:
            return f"{self.name} does not sum routes by {kind.combine.value}."
        if not self.computes(kind.activation):
            return f"{self.name} has no code for {kind.activation.__name__}."
        if kind.bias not in self.biases:
            return f"{self.name} adds no biases."
        if path is not Path.BF16 and kind.dtype not in self.beside_fp8:
            return f"It takes BF16 activations, not {str(kind.dtype).removeprefix('torch.')}."
        return None

    def readable(self, target: Target, path: Path) -> tuple[WeightFormat, ...]:
        """The weights that the kernels read there, best first; none without a kernel."""
        return self.reads.get(target, {}).get(path, ())

    def computes(self, activation: type[Activation]) -> bool:
        """Whether it has code for an activation."""
        return activation in self.activations

    @abstractmethod
    def defaults(self, kind: CallKind) -> tuple[TileRange, ...]:
        """Tiles where nothing was measured, by expected rows per expert, ascending; the last range has no end.

        Args:
            kind: of calls that it accepts.
        """

    def block_ms(self, rows: float) -> list[int]:
        """Row blocks that are worth trying for ``rows`` expected rows per expert: powers of two."""
        return powers_of_two(rows, self.least_block_m)

    @abstractmethod
    def candidates(self, kind: CallKind, block_m: int, rows: float) -> Iterator[GemmTile]:
        """Tiles of either GEMM that are worth trying.

        Args:
            kind: of calls that it accepts.
            block_m: rows of a block, one of `block_ms`.
            rows: expected rows per expert.
        """

    def fits(self, tile: GemmTile, form: WeightFormat, block_m: int) -> bool:
        """Whether a tile of this family can be launched with ``block_m``, as far as that is known before compiling."""
        return block_m >= self.least_block_m and block_m.bit_count() == 1

    def scratch(self, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
        """Memory of the rows between the stages, in elements of the activations' dtype.

        Args:
            tokens: T.
            top_k: K.
            hidden: H.
            intermediate: I.

        Returns:
            ``[R, I]`` and ``[R, H]``.
        """
        return ScratchSize(tokens * top_k * intermediate, tokens * top_k * hidden)

    @abstractmethod
    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """The launches of a call, on memory that is there before the first one runs. No host sync in any."""

    def step_of(self, stage: Stage, tiles: LayerTiles) -> str:
        """The step that a stage is launched in, in ``tiles`` and with an activation as tiles are searched with."""
        return stage.value
