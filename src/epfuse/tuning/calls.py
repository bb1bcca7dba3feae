"""A layer call, and each of its two GEMMs alone, in tiles that the caller names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Activation, Combine, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.families.family import LayerCall, Stage, Steps
from epfuse.families.registry import family_of
from epfuse.scratch import Scratch
from epfuse.stages.tiles import LayerTiles
from epfuse.weights.experts import ExpertWeights


@checks_enums
def layer_call(
    form: WeightFormat,
    weights: ExpertWeights,
    hidden: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: ExpertMap,
    activation: Activation | None = None,
) -> LayerCall:
    """The operands of a call on the weights in ``form``, with memory for its result; they are taken to fit.

    Args:
        form: a format that ``weights`` has.
        weights: of L experts.
        hidden: ``[T, H]``, contiguous; bfloat16, or the weights' dtype if they are dense.
        topk_weights: ``[T, K]`` float32.
        topk_ids: ``[T, K]`` int32 or int64.
        expert_map: of E experts.
        activation: None for MiniMax-M3's.

    Returns:
        The call; its ``out`` is new memory, ``[T, H]`` in hidden's dtype, its combine DETERMINISTIC.

    Raises:
        KeyError: ``weights`` has no such format.
    """
    experts = weights.kept[form]
    shape = LayerShape(
        weights.hidden, weights.intermediate, expert_map.num_experts, weights.local_experts, topk_ids.shape[1]
    )
    operands = (hidden, experts.w13, experts.w2, topk_weights, topk_ids, expert_map.on(hidden.device), shape)
    rest = (activation or SwiGLUOAI(), Combine.DETERMINISTIC, torch.empty_like(hidden), None)
    return LayerCall(*operands, *rest, weights.gate_up_bias, weights.down_bias)


@checks_enums
def bind_layer(path: Path, form: WeightFormat, tiles: LayerTiles, call: LayerCall) -> Callable[[], torch.Tensor]:
    """What `fused_experts` runs, in ``tiles``.

    Args:
        path: whose kernels.
        form: the format of the call's weights.
        tiles: of both GEMMs.
        call: its operands.

    Returns:
        Runs the call and gives back its ``out``, ``[T, H]``.

    Raises:
        ConfigError: no kernel that reads ``form`` takes such tiles.
    """
    family = family_of(path, form, tiles)

    def run() -> torch.Tensor:
        _launch(family.steps(call, tiles))
        return call.out

    return run


@checks_enums
def bind_stage(
    path: Path, form: WeightFormat, tiles: LayerTiles, call: LayerCall, stage: Stage
) -> Callable[[], torch.Tensor]:
    """Run the call once, into its ``out``; then the step of one of its stages, again and again.

    Args:
        path: whose kernels.
        form: the format of the call's weights.
        tiles: of both GEMMs.
        call: its operands.
        stage: the GEMM whose step is run again.

    Returns:
        Runs the step and gives back ``[1]`` int32, how many padded rows the call has, for whoever wants a result: what
        the step writes is the family's business.

    Raises:
        ConfigError: no kernel that reads ``form`` takes such tiles.
    """
    family = family_of(path, form, tiles)
    name = family.step_of(stage, tiles)
    if name == stage.value:
        steps = family.steps(call, tiles)
        _launch(steps)
    else:  # one launch has both stages: it runs one of them on a call without the other's weights
        shape, tokens = call.shape, call.hidden.shape[0]
        size = family.scratch(tokens, shape.top_k, shape.hidden, shape.intermediate)
        call = call._replace(scratch=Scratch(call.hidden.new_empty(size.y), call.hidden.new_empty(size.routed)))
        _launch(family.steps(call, tiles))
        steps = family.steps(call._replace(w2=None) if stage is Stage.GATE_UP else call._replace(w13=None), tiles)
        _launch(steps, before=name)
    step, table = dict(steps.launches)[name], steps.table
    assert table is not None, f"{family.name} has no tiles to search"
    arrivals = table.arrivals

    def run() -> torch.Tensor:
        if arrivals is not None:  # in a whole call routing clears them, and what makes the rows lies between:
            arrivals.zero_()
            arrivals.new_zeros(1)  # Hopper's kernels count before the launch before them has ended
        step()
        return table.num_padded

    return run


def _launch(steps: Steps, before: str | None = None) -> None:
    """All steps in order, or those before one."""
    for name, launch in steps.launches:
        if name == before:
            return
        launch()
