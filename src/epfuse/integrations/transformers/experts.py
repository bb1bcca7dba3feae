"""The module that stands where a transformers experts module stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums
from epfuse.config import Activation, Path, WeightFormat
from epfuse.environment import environment
from epfuse.errors import ConfigError
from epfuse.expert_map import ExpertMap
from epfuse.numerics.reinterpret import reinterpret
from epfuse.operands import wide_ids
from epfuse.parallel.group import EPGroup
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.projections import stack_tensors


class EPExperts(nn.Module):
    """One rank's share of a MoE layer's experts; stands where a transformers experts module stood. Inference only.

    Its parameters are ``gate_up_proj`` ``[L, 2I, H]`` and ``down_proj`` ``[L, H, I]``, of MXFP8 weights also their
    scale bytes, ``gate_up_proj_scale`` ``[L, 2I, H/32]`` and ``down_proj_scale`` ``[L, H, I/32]``, and the biases that
    there are, ``gate_up_proj_bias`` ``[L, 2I]`` and ``down_proj_bias`` ``[L, H]`` float32.

    Args:
        weights: dense, or MXFP8 as checkpoints have it.
        expert_map: which of the E experts these are.
        activation: between the projections.
        group: the ranks whose outputs add up to the layer.
        path: how each rank computes its share.
        names: of the two weights; others where they lie in another layout than the module's that they came from, so
            that nothing is loaded from its checkpoints by its names.

    Raises:
        ConfigError: weights in another format.
    """

    @checks_enums
    def __init__(
        self,
        weights: ExpertWeights,
        expert_map: ExpertMap,
        activation: Activation,
        group: EPGroup,
        path: Path = Path.AUTO,
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.names: tuple[str, str] = names
        for name, tensor in _tensors(weights, names).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.expert_map = expert_map
        self.activation = activation
        self.group = group
        self.path = path
        self._prepared: ExpertWeights | None = None

    def prepare(self) -> None:
        """Rearrange MXFP8 weights for the device that they are on; call once, after loading and .to().

        It happens in the parameters' own memory (`ExpertWeights.prepare`): what would save, load or move them
        afterwards is refused. Where nothing had to be rearranged, nothing is refused.
        """
        path = environment().path if self.path is Path.AUTO else self.path
        weights = self.weights()
        before = list(weights.kept)
        prepared = weights.prepare(path=path)
        if list(prepared.kept) != before:
            self._prepared = prepared

    def weights(self) -> ExpertWeights:
        """The prepared weights, else the parameters as they are now: .to() and checkpoint loading replace them."""
        if self._prepared is not None:
            return self._prepared
        mine = {name: parameter.detach() for name, parameter in self.named_parameters()}
        (first, second), (gate_up, down) = self.names, (mine[name] for name in self.names)
        if f"{first}_scale" in mine:
            weights = ExpertWeights.mxfp8(gate_up, mine[f"{first}_scale"], down, mine[f"{second}_scale"])
        else:
            weights = ExpertWeights.dense(gate_up, down)
        biases = mine.get(f"{first}_bias"), mine.get(f"{second}_bias")
        return weights if biases == (None, None) else ExpertWeights(weights.formats, *biases)

    def local_output(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """This rank's share, before the sum over ranks.

        Args:
            hidden_states: ``[T, H]``, the same on every rank; bfloat16, or the weights' dtype if they are dense.
            top_k_index: ``[T, K]`` integer global expert ids.
            top_k_weights: ``[T, K]`` router weights, any floating dtype.

        Returns:
            ``[T, H]`` in hidden_states' dtype.

        Raises:
            ConfigError: gradients are on, and an argument or a parameter requires one.
            EpfuseError: what `fused_experts` refuses.
        """
        if torch.is_grad_enabled():
            mine = dict(self.named_parameters())
            for name, tensor in {"hidden_states": hidden_states, "top_k_weights": top_k_weights, **mine}.items():
                if tensor.requires_grad:
                    raise ConfigError(
                        f"{name} requires grad; EPExperts has no backward: call the model under torch.no_grad()"
                    )
        return fused_experts(
            hidden_states.contiguous(),
            self.weights(),
            top_k_weights.float().contiguous(),
            wide_ids(top_k_index).contiguous(),
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
            ConfigError: gradients are on, and an argument or a parameter requires one.
            EpfuseError: what `fused_experts` refuses.
        """
        return self.group.all_reduce(self.local_output(hidden_states, top_k_index, top_k_weights))

    def _refuse_once_prepared(self, what: str) -> None:
        if self._prepared is not None:
            raise ConfigError(
                f"experts can't be {what} after prepare(): their memory holds"
                f" {', '.join(form.value for form in self._prepared.kept)} now; do it before"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EPExperts:
        self._refuse_once_prepared("moved or converted")
        applied: EPExperts = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._refuse_once_prepared("saved or loaded")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # torch's own would cast: E8M0 scales to 0, FP8 codes to numbers without their scales
        self._refuse_once_prepared("saved or loaded")
        for leaf, parameter in self.named_parameters():
            name = prefix + leaf
            if isinstance(state_dict.get(name), torch.Tensor):
                state_dict[name] = reinterpret(name, state_dict[name], parameter.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        local, hidden, inter = getattr(self, self.names[1]).shape
        share = f"experts={local}/{self.expert_map.num_experts}, rank={self.group.rank}/{self.group.size}"
        return f"{share}, hidden={hidden}, intermediate={inter}, path={self.path.value}"


def _tensors(weights: ExpertWeights, names: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor."""
    if list(weights.kept) not in ([WeightFormat.DENSE], [WeightFormat.MXFP8]):
        raise ConfigError(
            f"weights are in {', '.join(form.value for form in weights.kept)}; EPExperts takes dense or MXFP8 ones, as"
            " checkpoints have them"
        )
    experts = weights.reference_experts
    found: dict[str, torch.Tensor] = {}
    for name, stack, bias in zip(
        names, (experts.w13, experts.w2), (weights.gate_up_bias, weights.down_bias), strict=True
    ):
        found |= zip((name, f"{name}_scale"), stack_tensors(stack), strict=False)
        if bias is not None:
            found[f"{name}_bias"] = bias
    return found
