"""A layer call, and each of its two GEMMs alone, in tiles that the caller names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from epfuse import pipeline, pipeline_fp8
from epfuse.arguments import checks_enums
from epfuse.config import Combine, Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy.kernels import FP8_PATHS
from epfuse.stages.route.reference import local_experts, table_order
from epfuse.stages.route.table import RouteTable
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90PersistentTile, Sm90Tile
from epfuse.tuning.schema import Stage
from epfuse.weights.block_fp8 import BlockFP8, scale_block
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.fragment import FragmentMXFP8
from epfuse.weights.row_fp8 import RowFP8

if TYPE_CHECKING:
    from epfuse.stages.gather.launch import LoneTokens


@checks_enums
def call_layer(
    path: Path,
    form: WeightFormat,
    tiles: LayerTiles,
    weights: ExpertWeights,
    hidden: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: SwiGLUOAI | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `fused_experts` runs, in ``tiles``; the arguments are taken to fit."""
    call = (hidden, weights, topk_weights, topk_ids, expert_map, activation or SwiGLUOAI(), form, tiles)
    out = torch.empty_like(hidden) if out is None else out
    if path in FP8_PATHS:
        return pipeline_fp8.run_fp8_kernels(*call, Combine.DETERMINISTIC, out)
    return pipeline.run_kernels(*call, out)


@checks_enums
@dataclass(frozen=True)
class StageInputs:
    """What the two GEMMs of a call read, and what they make of it in tiles that are known to be right.

    Attributes:
        path: what runs.
        form: the format that it reads.
        weights: of the layer.
        hidden: ``[T, H]`` BF16.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]``.
        slots: ``[E]`` int32, local slot or -1.
        activation: of the experts.
        gate_up: what gate_up makes, a row per route: ``[R, I]``, or ``[R, 2I]`` before the activation where another
            kernel activates (FP8 rows without persistent tiles).
        down: what down makes: ``[R, H]``.
    """

    path: Path
    form: WeightFormat
    weights: ExpertWeights
    hidden: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    slots: torch.Tensor
    activation: SwiGLUOAI
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    @checks_enums
    def of(
        cls,
        path: Path,
        form: WeightFormat,
        weights: ExpertWeights,
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: ExpertMap,
        activation: SwiGLUOAI,
        tiles: LayerTiles,
    ) -> StageInputs:
        """Run both stages in ``tiles``."""
        nothing = torch.empty(0, device=hidden.device)
        slots = expert_map.on(hidden.device)
        bare = cls(path, form, weights, hidden, topk_weights, topk_ids, slots, activation, nothing, nothing)
        gate_up = bare.bind(Stage.GATE_UP, tiles.block_m, tiles.gate_up)()
        if tiles.packed:
            gate_up = bare._by_route(gate_up)
        half = cls(path, form, weights, hidden, topk_weights, topk_ids, slots, activation, gate_up, nothing)
        down = half.bind(Stage.DOWN, tiles.block_m, tiles.down)()
        if tiles.packed:
            down = bare._by_route(down)
        return cls(path, form, weights, hidden, topk_weights, topk_ids, slots, activation, gate_up, down)

    @cached_property
    def local_routes(self) -> torch.Tensor:
        """The local routes in the route table's order, which does not depend on how it is cut into blocks."""
        return table_order(local_experts(self.topk_ids, self.slots))

    def _by_route(self, packed: torch.Tensor) -> torch.Tensor:
        rows = torch.empty_like(packed)
        rows[self.local_routes] = packed[: self.local_routes.numel()]
        return rows

    def rows_of(self, output: torch.Tensor, tile: GemmTile) -> torch.Tensor:
        """The rows of the local routes in a stage's output, in the order of `local_routes`."""
        if isinstance(tile, Sm90PersistentTile):
            return output[: self.local_routes.numel()]
        return output[self.local_routes]

    @checks_enums
    def bind(self, stage: Stage, block_m: int, tile: GemmTile) -> Callable[[], torch.Tensor]:
        """A call of one stage, with its routes sorted and its rows quantised beforehand."""
        from epfuse.stages.route.launch import launch_route

        local = self.weights.local_experts
        arrivals = LayerTiles(block_m, tile, tile).arrivals(self.weights.hidden, self.weights.intermediate)
        routes = launch_route(self.topk_ids, self.slots, local, block_m, arrivals_per_block=arrivals)
        _step_between(routes.num_padded)
        if self.path in FP8_PATHS:
            if isinstance(tile, Sm90PersistentTile):
                return self._bind_packed_fp8(stage, routes, tile)
            return self._bind_fp8(stage, routes, tile)
        from epfuse.stages.down.launch import launch_down
        from epfuse.stages.gate_up.launch import launch_gate_up

        experts = self.weights.kept[self.form]
        w13, w2 = experts.w13, experts.w2
        assert not isinstance(w13, BlockFP8 | RowFP8)
        assert not isinstance(w2, BlockFP8 | RowFP8)
        top_k = self.topk_ids.shape[1]
        x, y = self.hidden, self.gate_up
        if isinstance(tile, Sm90PersistentTile):
            return self._bind_persistent(stage, routes, tile)

        def gate_up() -> torch.Tensor:
            _clear(routes.arrivals, tile)
            return launch_gate_up(x, w13, routes, top_k, self.activation, tile)

        def down() -> torch.Tensor:
            _clear(routes.arrivals, tile)
            return launch_down(y, w2, routes, self.topk_weights, tile)

        return gate_up if stage is Stage.GATE_UP else down

    def _bind_persistent(
        self, stage: Stage, routes: RouteTable, tile: Sm90PersistentTile
    ) -> Callable[[], torch.Tensor]:
        """One of the two GEMMs, by the kernel that runs both in a call."""
        from epfuse.stages.gate_up_down.launch import launch_gate_up_down
        from epfuse.stages.gather.launch import launch_gather

        experts, arrivals = self.weights.kept[self.form], routes.arrivals
        w13 = experts.w13 if stage is Stage.GATE_UP else None
        w2 = experts.w2 if stage is Stage.DOWN else None
        assert isinstance(w13, FragmentMXFP8 | None)
        assert isinstance(w2, FragmentMXFP8 | None)
        assert arrivals is not None
        x, y = (self.hidden.new_empty(routes.num_routes, n) for n in (self.weights.hidden, self.weights.intermediate))
        out, nobody = torch.empty_like(x), self._nobody()
        if stage is Stage.GATE_UP:
            launch_gather(self.hidden, routes, self.topk_ids.shape[1], x)
        else:
            y[: self.local_routes.numel()] = self.gate_up[self.local_routes]

        def run() -> torch.Tensor:
            _zero(arrivals)
            launch_gate_up_down(x, w13, w2, routes, self.topk_weights, self.activation, tile, y, out, nobody)
            return y if stage is Stage.GATE_UP else out

        return run

    def _nobody(self) -> LoneTokens:
        """No lone tokens, for the kernel that a call runs, which looks for them."""
        from epfuse.stages.gather.launch import LoneTokens

        of_row = self.slots.new_full((self.topk_ids.numel(),), -1)
        return LoneTokens(self.topk_ids, self.slots, self.weights.local_experts, of_row, torch.empty_like(self.hidden))

    def _bind_packed_fp8(
        self, stage: Stage, routes: RouteTable, tile: Sm90PersistentTile
    ) -> Callable[[], torch.Tensor]:
        from epfuse.stages.down.launch_sm90_fp8 import launch_down_sm90_fp8
        from epfuse.stages.gate_up.launch_sm90_fp8 import launch_gate_up_sm90_fp8
        from epfuse.stages.quantize.launch_packed import launch_quantize_packed

        experts, arrivals = self.weights.kept[self.form], routes.arrivals
        w13, w2 = experts.w13, experts.w2
        assert isinstance(w13, RowFP8)
        assert isinstance(w2, RowFP8)
        assert arrivals is not None
        nobody = self._nobody()
        if stage is Stage.GATE_UP:
            x = launch_quantize_packed(self.hidden, routes, self.topk_ids.shape[1])
        else:
            packed = torch.empty_like(self.gate_up)
            packed[: self.local_routes.numel()] = self.gate_up[self.local_routes]
            y = launch_quantize_packed(packed, routes, None)

        def run() -> torch.Tensor:
            _zero(arrivals)
            if stage is Stage.GATE_UP:
                return launch_gate_up_sm90_fp8(x, w13, routes, self.activation, tile)
            return launch_down_sm90_fp8(y, w2, routes, self.topk_weights, tile, lone=nobody)

        return run

    def _bind_fp8(self, stage: Stage, routes: RouteTable, tile: GemmTile) -> Callable[[], torch.Tensor]:
        from epfuse.stages.activate.launch import launch_activate
        from epfuse.stages.down.launch_fp8 import launch_down_fp8
        from epfuse.stages.gate_up.launch_fp8 import launch_gate_up_fp8
        from epfuse.stages.quantize.launch import launch_quantize

        experts = self.weights.kept[self.form]
        w13, w2 = experts.w13, experts.w2
        assert isinstance(w13, MXFP8 | BlockFP8)
        assert isinstance(w2, MXFP8 | BlockFP8)
        group, values = scale_block(w13)[1], w13.values.dtype
        if stage is Stage.GATE_UP:
            x = launch_quantize(self.hidden, group, dtype=values)
            return lambda: launch_gate_up_fp8(x, w13, routes, self.topk_ids.shape[1], tile, self.hidden.dtype)
        y = launch_activate(self.gate_up, routes, self.activation, group, dtype=values)
        size = (routes.num_routes, self.weights.hidden)

        def down() -> torch.Tensor:
            out = torch.empty(size, dtype=self.hidden.dtype, device=self.hidden.device)
            return launch_down_fp8(y, w2, routes, self.topk_weights, tile, Combine.DETERMINISTIC, out)

        return down


def _clear(arrivals: torch.Tensor | None, tile: GemmTile) -> None:
    """Kernels that share a reduction count arrivals from zero; in a whole call routing clears them."""
    if arrivals is not None and isinstance(tile, Sm90Tile) and tile.split_k > 1:
        arrivals.zero_()


def _zero(arrivals: torch.Tensor) -> None:
    """`_clear` for persistent tiles, which count before they wait for the kernel before them."""
    arrivals.zero_()
    _step_between(arrivals)


def _step_between(like: torch.Tensor) -> None:
    """A kernel that waits for all before it: Hopper's read the route table before the kernel before them has ended.

    In a whole call what makes the rows lies between.
    """
    like.new_zeros(1)
