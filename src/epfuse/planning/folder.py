"""What a Hugging Face folder holds for each rank, and what each GPU would run it with."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from epfuse.config import Policy
from epfuse.errors import ConfigError
from epfuse.expert_map import experts_of_rank
from epfuse.hardware.products import product_of
from epfuse.planning.model_plan import Serving, plan_model
from epfuse.target import Target
from epfuse.weights.checkpoint import ExpertCheckpoint
from epfuse.weights.expert_tensors import LayerTensors, Naming, Part
from epfuse.weights.layouts import GateUpRows, MatrixOrder


class Ranks(BaseModel):
    """Adjacent ranks that hold equally many experts.

    Attributes:
        first: the first of them.
        last: the last.
        experts: what each holds of every layer.
        bytes: what each reads of the files, over all layers.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    first: int
    last: int
    experts: int
    bytes: int


class TargetPaths(BaseModel):
    """How one GPU would run the experts.

    Attributes:
        target: its kernels.
        storage: what a layer keeps; "untouched" where epfuse does not run it.
        paths: what calls take, in the order of token counts.
        reason: for the storage, or why there is none.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    target: str
    storage: str
    paths: tuple[str, ...]
    reason: str


class FolderRecord(BaseModel):
    """One folder.

    Attributes:
        model: the language model's type.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: K.
        layers: those with experts, ascending.
        activation: between the projections, in words.
        has_bias: whether the projections have biases.
        format: the experts' numbers.
        dtypes: of the tensors, as safetensors names them: "weight", "scale", "bias".
        naming: "matrices" or "stacks".
        module: the experts' name in the first such layer.
        order: of gate and up rows in stacks, and whether matrices lie transposed.
        bytes: of all experts in the files.
        ep_size: P.
        ranks: what each rank reads.
        targets: what each GPU would do.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    model: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: tuple[int, ...]
    activation: str
    has_bias: bool
    format: str
    dtypes: dict[str, str]
    naming: str
    module: str
    order: str
    bytes: int
    ep_size: int
    ranks: tuple[Ranks, ...]
    targets: tuple[TargetPaths, ...]


def describe(checkpoint: ExpertCheckpoint, ep_size: int, max_model_len: int) -> FolderRecord:
    """All that is known of a folder without reading its weights.

    Args:
        checkpoint: opened, hence checked.
        ep_size: P.
        max_model_len: the longest sequence that is to be served, tokens.

    Raises:
        ConfigError: there are more ranks than experts.
    """
    model = checkpoint.model
    layer = next(iter(checkpoint.layers.values()))
    total = sum(found.expert_bytes for found in checkpoint.layers.values())
    return FolderRecord(
        model=model.name,
        hidden=model.hidden,
        intermediate=model.intermediate,
        experts=model.experts,
        top_k=model.top_k,
        layers=tuple(checkpoint.layers),
        activation=str(model.activation),
        has_bias=model.has_bias,
        format=model.checkpoint.value,
        dtypes={part.value: " ".join(found) for part in Part if (found := layer.dtypes(part))},
        naming=layer.naming.value,
        module=layer.module,
        order=_order(layer, model.activation.inputs == 2),
        bytes=model.experts * total,
        ep_size=ep_size,
        ranks=_ranks(model.experts, ep_size, total),
        targets=tuple(_paths(checkpoint, target, ep_size, max_model_len) for target in Target if target.is_gpu),
    )


def _order(layer: LayerTensors, gated: bool) -> str:
    if layer.naming is Naming.MATRICES:
        return "gate, up and down apart" if gated else "up and down apart, no gate"
    rows = "gate and up rows alternate" if layer.layout.gate_up is GateUpRows.ALTERNATING else "gate rows, then up rows"
    rows = rows if gated else "no gate"
    return rows + (", transposed" if layer.layout.matrices is MatrixOrder.COLUMNS else "")


def _ranks(experts: int, ep_size: int, expert_bytes: int) -> tuple[Ranks, ...]:
    if ep_size > experts:
        raise ConfigError(f"ep_size is {ep_size}; it must be in 1..{experts}, the model's experts")
    most, more = len(experts_of_rank(experts, ep_size, 0)), experts % ep_size
    found = [Ranks(first=0, last=(more or ep_size) - 1, experts=most, bytes=most * expert_bytes)]
    if more:
        found.append(Ranks(first=more, last=ep_size - 1, experts=most - 1, bytes=(most - 1) * expert_bytes))
    return tuple(found)


def _paths(checkpoint: ExpertCheckpoint, target: Target, ep_size: int, max_model_len: int) -> TargetPaths:
    """By the rules that `epfuse plan` asks."""
    serving = Serving(product_of(target), ep_size, max_model_len, product_of(target).hbm_bytes)
    try:
        kinds = plan_model(checkpoint.model, serving, Policy.AUTO).kinds()
    except ConfigError as reason:  # it does not fit
        return TargetPaths(target=target.value, storage="none", paths=(), reason=str(reason))
    paths = dict.fromkeys(entry.decision.path.value for kind in kinds for entry in kind.ranges)
    storages = dict.fromkeys(kind.storage.value for kind in kinds)
    return TargetPaths(
        target=target.value, storage=" ".join(storages), paths=tuple(paths), reason=" ".join(k.reason for k in kinds)
    )
