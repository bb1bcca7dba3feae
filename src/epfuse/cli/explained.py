"""How ``explain`` of every server shows a model's layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from epfuse.integrations.explained import ChoiceGroup, paths
from epfuse.report.terminal import make_table


def layer_table(groups: Sequence[ChoiceGroup], title: str) -> Table:
    """One row a group.

    Args:
        groups: of a model.
        title: model, server, GPUs and ranks.
    """
    table = make_table("layers", "without epfuse", "with epfuse", "why", title=title)
    several = len({group.intermediate for group in groups}) > 1
    for group in groups:
        own = f"{group.own.name}. {group.own.effect}"
        layers = _indices(group.layers) + (f", I {group.intermediate}" if several else "")
        table.add_row(layers, own, _ours(group), group.choice.reason)
    return table


def _ours(group: ChoiceGroup) -> str:
    plan = group.choice.plan
    if plan is None:
        return f"the same ({group.own.name})"
    runs = ", ".join(f"{part['path']} from {part['min_tokens']}" for part in paths(plan))
    return f"{group.ours}, weights {plan.storage.value}, {plan.nbytes / 1e9:.2f} GB a layer; {runs} tokens"


def _indices(layers: Sequence[int]) -> str:
    """``3..59``, or a single index."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
