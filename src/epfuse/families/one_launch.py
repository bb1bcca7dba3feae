"""What families share that gather the rows and launch both GEMMs at once, on rows in the activations' dtype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from epfuse.families.family import Family, LayerCall, Stage, Step, Steps
from epfuse.families.memory import rows_between
from epfuse.stages.route.table import LoneTokens
from epfuse.stages.tiles import LayerTiles


class OneLaunch(Family):
    """route -> gather -> gate_up_down -> combine."""

    @abstractmethod
    def gemms(self) -> Callable[..., object]:
        """What launches both GEMMs, with the arguments of `launch_gate_up_down`."""

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """Down's results of a block are written where its gathered rows were, which are dead by then."""
        from epfuse.stages.combine.launch import launch_combine
        from epfuse.stages.gather.launch import launch_gather
        from epfuse.stages.route.launch import launch_route

        shape, slots, rows = call.shape, call.slots, rows_between(call)
        table = call.table(tiles.block_m, tiles.arrivals(shape.hidden, shape.intermediate))
        route_row = slots.new_empty(call.routes)
        lone = LoneTokens.of(call.topk_ids, slots, shape.local_experts, call.out, rows.out_is_free)
        experts = (call.w13, call.w2, table, call.topk_weights, call.activation, tiles.gate_up)
        memory = (rows.y, rows.routed, lone, call.gate_up_bias, call.down_bias)
        routed = (rows.routed, call.topk_ids, slots, shape.local_experts, call.out, route_row)
        launches: tuple[Step, ...] = (
            ("route", partial(launch_route, call.topk_ids, slots, shape.local_experts, table)),
            ("gather", partial(launch_gather, call.hidden, table, shape.top_k, rows.routed, route_row, lone)),
            ("gate_up_down", partial(self.gemms(), rows.routed, *experts, *memory)),
            ("combine", partial(launch_combine, *routed, out_is_free=rows.out_is_free)),
        )
        return Steps(table, launches)

    def step_of(self, stage: Stage, tiles: LayerTiles) -> str:
        """Both are one launch, which runs one alone on a call without the other's weights."""
        return "gate_up_down"
