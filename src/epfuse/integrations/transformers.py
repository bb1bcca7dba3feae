"""Run a transformers model's routed experts through epfuse, expert-parallel.

group = EPGroup.current()                        # or EPGroup.single()
replacement = replace_experts(model, group)      # every rank holds E/P experts from here on
model.generate(...)
replacement.revert()                             # the untouched modules again, if still wanted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epfuse.api import fused_experts
from epfuse.config import Path, SwiGLUOAI, WeightFormat, silu_gate
from epfuse.environment import environment
from epfuse.errors import ConfigError, LayoutError, ShapeError
from epfuse.expert_map import ExpertMap
from epfuse.parallel.group import EPGroup
from epfuse.parallel.shard import shard_experts
from epfuse.stages.gate_up.reference import swiglu_oai
from epfuse.weights.experts import ExpertWeights


class EPExperts(nn.Module):
    """One rank's share of a MoE layer's experts; stands where a transformers experts module stood. Inference only.

    Its parameters are ``gate_up_proj`` ``[L, 2I, H]`` and ``down_proj`` ``[L, H, I]``, and of MXFP8 weights also their
    scale bytes, ``gate_up_proj_scale`` ``[L, 2I, H/32]`` and ``down_proj_scale`` ``[L, H, I/32]``.

    Args:
        weights: dense, or MXFP8 as checkpoints have it.
        expert_map: which of the E experts these are.
        activation: SwiGLU-OAI parameters.
        group: the ranks whose outputs add up to the layer.
        path: how each rank computes its share.

    Raises:
        ConfigError: weights in another format.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        weights: ExpertWeights,
        expert_map: ExpertMap,
        activation: SwiGLUOAI,
        group: EPGroup,
        path: Path = Path.AUTO,
    ) -> None:
        super().__init__()
        for name, tensor in _tensors(weights).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.expert_map = expert_map
        self.activation = activation
        self.group = group
        self.path = path
        self._prepared: ExpertWeights | None = None

    def prepare(self) -> None:
        """Rearrange MXFP8 weights for the device that they are on; call once, after loading and .to().

        It happens in the parameters' own memory (`ExpertWeights.prepare`): don't save, load or move them afterwards.
        """
        path = environment().path if self.path is Path.AUTO else self.path
        self._prepared = self.weights().prepare(path=path)

    def weights(self) -> ExpertWeights:
        """The prepared weights, else the parameters as they are now: .to() and checkpoint loading replace them."""
        if self._prepared is not None:
            return self._prepared
        gate_up, down = self.gate_up_proj.data, self.down_proj.data
        scales = [getattr(self, f"{name}_scale", None) for name in ("gate_up_proj", "down_proj")]
        if scales[0] is None or scales[1] is None:
            return ExpertWeights.dense(gate_up, down)
        return ExpertWeights.mxfp8(gate_up, scales[0].data, down, scales[1].data)

    def local_output(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """This rank's share, ``[T, H]``, before the sum over ranks. Arguments as in `forward`."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ConfigError(
                "hidden_states requires grad; EPExperts has no backward: call the model under torch.no_grad()"
            )
        return fused_experts(
            hidden_states.contiguous(),
            self.weights(),
            top_k_weights.float().contiguous(),
            top_k_index.contiguous(),
            self.expert_map,
            activation=self.activation,
            path=self.path,
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The layer's routed output on every rank: own share, then the sum over ranks (a collective).

        Args:
            hidden_states: ``[T, H]``, the same on every rank.
            top_k_index: ``[T, K]`` integer global expert ids.
            top_k_weights: ``[T, K]`` router weights.

        Returns:
            ``[T, H]`` in hidden_states' dtype.

        Raises:
            ConfigError: called with gradients on.
            EpfuseError: what `fused_experts` refuses.
        """
        return self.group.all_reduce(self.local_output(hidden_states, top_k_index, top_k_weights))

    def extra_repr(self) -> str:
        local, hidden, inter = self.down_proj.shape
        share = f"experts={local}/{self.expert_map.num_experts}, rank={self.group.rank}/{self.group.size}"
        return f"{share}, hidden={hidden}, intermediate={inter}, path={self.path.value}"


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
        """Parameter name -> the map that cuts its first dimension; what `parallel.checkpoint.load_sharded` needs."""
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

    An experts module is one with parameters ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``:
    MiniMaxM3VLExperts, Qwen3MoeExperts and their kind. Routers, shared experts and attention stay as they are, on every
    rank. Either all of them are replaced or, on an error, none. A model on the meta device works: its shards are meta
    tensors for `parallel.checkpoint.load_sharded` to fill.

    Args:
        model: changed in place; every rank passes the same one.
        group: the ranks that share each layer.
        path: how each rank computes its share.
        form: DENSE keeps the weights as they are, MXFP8 quantises the rank's share.

    Returns:
        Replacement, which can revert.

    Raises:
        ConfigError: no experts module in the model, E not a multiple of P, or an activation that epfuse doesn't have.
        LayoutError: interleaved or transposed weights, biases, no gate, or a norm after the experts.
        ShapeError, DtypeError: weights that don't describe one layer, or are quantised.
    """
    originals = {name: module for name, module in model.named_modules() if _is_experts(module)}
    if not originals:
        raise ConfigError(
            f"model {type(model).__name__} has no module with parameters gate_up_proj [E, 2I, H] and down_proj"
            " [E, H, I]: nothing to replace (a dense model, or its experts are replaced already?)"
        )
    experts = {}
    for name, module in originals.items():
        check_layout(name, module)
        gate_up, down = _weights(module)
        expert_map = group.expert_map(gate_up.shape[0], "cpu" if gate_up.is_meta else gate_up.device)
        weights = ExpertWeights.dense(shard_experts(gate_up, expert_map), shard_experts(down, expert_map))
        if form is WeightFormat.MXFP8:
            weights = ExpertWeights.quantize(weights)
        elif form is not WeightFormat.DENSE:
            raise ConfigError(f"form is {form.value!r}; experts are replaced by dense or mxfp8 ones")
        experts[name] = EPExperts(weights, expert_map, activation_of(name, module), group, path)
    for name, replacement in experts.items():
        model.set_submodule(name, replacement)
    return Replacement(model, experts, originals)


def check_layout(name: str, module: nn.Module) -> None:
    """Refuse experts whose weights epfuse would read wrongly.

    The flags are those that transformers' ``use_experts_implementation`` puts on a module; the shapes are checked too,
    for modules without them.

    Raises:
        LayoutError, ShapeError: ``module`` is not [E, 2I, H] with two halves, [E, H, I], and nothing else.
    """
    refusals = {
        "interleaved gate and up rows": not getattr(module, "is_concatenated", True),
        "transposed weights": getattr(module, "is_transposed", False),
        "no gate projection": not getattr(module, "has_gate", True),
        "a norm after the experts": getattr(module, "has_post_expert_norm", False),
        "biases": getattr(module, "has_bias", False)
        or any(key.endswith("bias") for key, _ in module.named_parameters()),
    }
    found = [what for what, present in refusals.items() if present]
    if found:
        raise LayoutError(
            f"{name} ({type(module).__name__}) has {', '.join(found)}; epfuse needs gate_up_proj [E, 2I, H] with gate"
            " rows first, down_proj [E, H, I], and no biases"
        )
    gate_up, down = _weights(module)
    experts, twice, hidden = gate_up.shape
    if tuple(down.shape) != (experts, hidden, twice // 2) or twice % 2:
        raise ShapeError(
            f"{name} has gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}; they must be [E, 2I, H]"
            " and [E, H, I]"
        )


def activation_of(name: str, module: Any) -> SwiGLUOAI:
    """The activation of a transformers experts module, confirmed by running the module's own on a few numbers.

    Raises:
        ConfigError: the module computes something else than SwiGLU-OAI or ``silu(gate) * up``.
    """
    if hasattr(module, "swiglu_alpha") and hasattr(module, "swiglu_limit"):
        activation = SwiGLUOAI(alpha=module.swiglu_alpha, beta=1.0, limit=module.swiglu_limit)
    else:
        activation = silu_gate()
    own = getattr(module, "_apply_gate", None)
    probe = torch.linspace(-12.0, 12.0, 64, device="cpu").view(2, 32)
    probe[1] = probe[1].flip(0)
    if own is None or not torch.allclose(own(probe), swiglu_oai(probe, activation), rtol=1e-5, atol=1e-5):
        raise ConfigError(
            f"{name} ({type(module).__name__}) has an activation that epfuse does not know; it computes SwiGLU-OAI"
            " (swiglu_alpha, swiglu_limit) and silu(gate) * up"
        )
    return activation


def _tensors(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor."""
    if list(weights.kept) == [WeightFormat.DENSE] and weights.dense_experts is not None:
        return {"gate_up_proj": weights.dense_experts.w13, "down_proj": weights.dense_experts.w2}
    if list(weights.kept) == [WeightFormat.MXFP8] and weights.mxfp8_experts is not None:
        w13, w2 = weights.mxfp8_experts.w13, weights.mxfp8_experts.w2
        return {
            "gate_up_proj": w13.values,
            "gate_up_proj_scale": w13.scales,
            "down_proj": w2.values,
            "down_proj_scale": w2.scales,
        }
    raise ConfigError(
        f"weights are in {', '.join(form.value for form in weights.kept)}; EPExperts takes dense or MXFP8 ones, as"
        " checkpoints have them"
    )


def _is_experts(module: nn.Module) -> bool:
    if isinstance(module, EPExperts):
        return False
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def _weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return module.gate_up_proj.detach(), module.down_proj.detach()
