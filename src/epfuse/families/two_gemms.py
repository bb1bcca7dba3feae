"""What families share that launch the two GEMMs one after the other, on rows in the activations' dtype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from epfuse.families.family import Family, LayerCall, Step, Steps
from epfuse.families.memory import rows_between
from epfuse.stages.tiles import LayerTiles


class TwoGemms(Family):
    """route -> gate_up -> down -> combine, with a row per route between the stages."""

    @abstractmethod
    def gemms(self) -> tuple[Callable[..., object], Callable[..., object]]:
        """What launches gate_up and what launches down, with the arguments of `launch_gate_up` and `launch_down`."""

    def steps(self, call: LayerCall, tiles: LayerTiles) -> Steps:
        """A row per route between the stages."""
        from epfuse.stages.combine.launch import launch_combine
        from epfuse.stages.route.launch import launch_route

        launch_gate_up, launch_down = self.gemms()
        shape, rows = call.shape, rows_between(call)
        table = call.table(tiles.block_m, tiles.arrivals(shape.hidden, shape.intermediate))
        x = (call.hidden, call.w13, table, shape.top_k, call.activation, tiles.gate_up, rows.y, call.gate_up_bias)
        y = (rows.y, call.w2, table, call.topk_weights, tiles.down, rows.routed, call.down_bias)
        routed = (rows.routed, call.topk_ids, call.slots, shape.local_experts, call.out)
        launches: tuple[Step, ...] = (
            ("route", partial(launch_route, call.topk_ids, call.slots, shape.local_experts, table)),
            ("gate_up", partial(launch_gate_up, *x)),
            ("down", partial(launch_down, *y)),
            ("combine", partial(launch_combine, *routed, out_is_free=rows.out_is_free)),
        )
        return Steps(table, launches)
