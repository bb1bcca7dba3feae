"""Put `EPExperts` in the place of a model's experts modules, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from epfuse.arguments import member, shown
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError, EpfuseError
from epfuse.expert_map import ExpertMap
from epfuse.integrations.transformers.activation import activation_of
from epfuse.integrations.transformers.experts import EPExperts
from epfuse.integrations.transformers.layout import check_layout, is_experts, layout_of, names_of
from epfuse.parallel.group import EPGroup
from epfuse.parallel.shard import shard_experts
from epfuse.weights.experts import ExpertWeights


@dataclass
class Replacement:
    """What `replace_experts` did. It keeps the original modules (and their memory) alive: drop it if never reverting.

    Attributes:
        model: the model that was changed.
        experts: module name -> what stands there now, in model order.
        originals: module name -> what stood there.
    """

    model: nn.Module
    experts: dict[str, EPExperts]
    originals: dict[str, nn.Module]

    @property
    def sharded_parameters(self) -> dict[str, ExpertMap]:
        """Parameter name -> the map that cuts its first dimension; what `weights.checkpoint.load_sharded` needs."""
        return {
            f"{name}.{leaf}": module.expert_map
            for name, module in self.experts.items()
            for leaf, _ in module.named_parameters()
        }

    def revert(self) -> None:
        """Put the original modules back; a second call changes nothing."""
        for name, module in self.originals.items():
            self.model.set_submodule(name, module)


def replace_experts(
    model: nn.Module, group: EPGroup, *, path: Path = Path.AUTO, form: WeightFormat = WeightFormat.DENSE
) -> Replacement:
    """Replace every experts module of a transformers model by this rank's `EPExperts`.

    An experts module is one with tensors ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``:
    MiniMaxM3VLExperts, Qwen3MoeExperts and their kind; GptOssExperts and others whose flags say that the weights are
    transposed or interleaved, or have no gate (``up_proj``), and their biases. Where they lie otherwise than epfuse
    reads them, the replacement's parameters have other names, ``w13`` and ``w2``: no checkpoint is loaded into them.

    Routers, shared experts and attention stay as they are, on every rank. Either all experts are replaced or, on an
    error, none. A module that stands in several places is replaced by one module in all of them. A model on the meta
    device works: its shards are meta tensors for `weights.checkpoint.load_sharded` to fill.

    Args:
        model: changed in place; every rank passes the same one.
        group: the ranks that share each layer; where P does not divide E, the first ranks hold one expert more.
        path: how each rank computes its share.
        form: DENSE keeps the weights as they are, MXFP8 quantises the rank's share.

    Returns:
        Replacement, which can revert.

    Raises:
        ConfigError: no experts module in the model, an argument of another type, or an activation that epfuse doesn't
            have.
        LayoutError: other tensors, a norm after the experts, hooks, an adapter, or tensors that are split over ranks
            (tensor parallelism) or packed.
        ShapeError, DtypeError: weights that don't describe one layer, or are quantised or float64.
    """
    member("path", path, Path)
    if form not in (WeightFormat.DENSE, WeightFormat.MXFP8):
        raise ConfigError(
            f"form is {getattr(form, 'value', form)!r}; experts are replaced by dense or mxfp8 ones (a WeightFormat)"
        )
    for argument, value, kind in (("model", model, nn.Module), ("group", group, EPGroup)):
        if not isinstance(value, kind):
            raise ConfigError(f"{argument} is {shown(value)}; it must be a {kind.__name__}")
    if is_experts(model):
        raise ConfigError(f"model {type(model).__name__} is an experts module itself; pass the module that holds it")
    places = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_experts(module)}
    if not places:
        raise ConfigError(
            f"model {type(model).__name__} has no module with parameters gate_up_proj [E, 2I, H] and down_proj"
            " [E, H, I]: nothing to replace (a dense model, or its experts are replaced already?)"
        )
    made: dict[int, EPExperts] = {}
    for name, module in places.items():
        if id(module) not in made:
            made[id(module)] = _share_of(name, module, group, path, form)
    experts = {name: made[id(module)] for name, module in places.items()}
    for name, replacement in experts.items():
        model.set_submodule(name, replacement)
    return Replacement(model, experts, places)


def _share_of(name: str, module: nn.Module, group: EPGroup, path: Path, form: WeightFormat) -> EPExperts:
    check_layout(name, module)
    activation = activation_of(name, module)
    names, layout = names_of(module), layout_of(module)
    gate_up, down = (module.get_parameter(leaf).detach() for leaf in names.weights)
    biases = [module._parameters.get(leaf) for leaf in names.biases]
    expert_map = group.expert_map(gate_up.shape[0], "cpu" if gate_up.is_meta else gate_up.device)
    try:
        first, second = (None if bias is None else shard_experts(bias.detach(), expert_map) for bias in biases)
        weights = ExpertWeights.dense(
            shard_experts(gate_up, expert_map),
            shard_experts(down, expert_map),
            gate_up_bias=first,
            down_bias=second,
            layout=layout,
        )
        if form is WeightFormat.MXFP8:
            weights = ExpertWeights.quantize(weights)
    except EpfuseError as reason:
        raise type(reason)(f"{name} ({type(module).__name__}): {reason}") from reason
    named = names.weights if layout.is_ours else ("w13", "w2")
    return EPExperts(weights, expert_map, activation, group, path, named).train(module.training)
