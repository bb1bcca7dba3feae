"""The short way to a CPU's products, for a module whose own tensors the library reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler
from torch.profiler import record_function

from epfuse.arguments import checks_enums
from epfuse.config import Activation, Bias, Combine, LayerShape, Path, WeightFormat
from epfuse.environment import environment
from epfuse.expert_map import ExpertMap
from epfuse.families.cpu import CPU, run_experts
from epfuse.families.family import LayerCall
from epfuse.integrations.transformers.layout import Names
from epfuse.operands import require_plain
from epfuse.policy.call import table_of
from epfuse.target import device_name, target_of
from epfuse.weights.experts import ExpertWeights

_CPU = torch.device("cpu")


class _Way(NamedTuple):
    """What calls with one K have in common; ``least`` as `run_experts` takes it, None where another family runs."""

    shape: LayerShape
    least: int | None


class DirectCall:
    """`fused_experts` of one module on a CPU, less all that is the same at each call.

    Between two layers nothing of the host's is in a cache, for the weights have passed through them: a line of Python
    then takes several times as long as in a loop. So what follows from the module is found out once, and a call looks
    at what may have changed. No weight is held.

    Args:
        names: of the module's tensors.
        weights: the module's, on a CPU, as `weights_of` reads them: dense parameters of its own, without biases.
        expert_map: all of the module's experts.
        activation: between the projections.
        path: how to compute.
    """

    @checks_enums
    def __init__(
        self, names: Names, weights: ExpertWeights, expert_map: ExpertMap, activation: Activation, path: Path
    ) -> None:
        dense = weights.dense_experts
        assert dense is not None
        self._weights, self._biases = names.weights, names.biases
        self._shapes = dense.w13.shape, dense.w2.shape
        self._dtype = dense.w13.dtype
        self._slots = expert_map.on(_CPU)
        self._sizes = weights.hidden, weights.intermediate, expert_map.num_experts, weights.local_experts
        self._activation = activation
        self._path = path
        self._ways: dict[int, _Way] = {}

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """``[T, H]`` as `fused_experts` gives it; None for a call that has to go the long way.

        Args:
            module: the one; its tensors may be others by now.
            hidden: ``[T, H]``.
            topk_ids: ``[T, K]``.
            topk_weights: ``[T, K]`` in any dtype.

        Raises:
            ConfigError, LayoutError: an operand is no plain tensor.
            UnsupportedTarget: the path does not run on a CPU.
        """
        tensors, (first, second) = module._parameters, self._weights
        w13, w2 = tensors.get(first), tensors.get(second)
        if not self._same(w13, self._shapes[0]) or not self._same(w2, self._shapes[1]):
            return None
        if any(tensors.get(bias) is not None for bias in self._biases):
            return None
        for name, tensor in (("hidden", hidden), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            require_plain(name, tensor)
            if tensor.device != _CPU or tensor.dim() != 2:
                return None
        tokens, top_k = topk_ids.shape
        if hidden.shape != (tokens, self._sizes[0]) or topk_weights.shape != (tokens, top_k) or not tokens * top_k:
            return None
        if hidden.dtype != self._dtype or topk_ids.dtype not in (torch.int64, torch.int32):
            return None
        shape, least = self._ways.get(top_k) or self._way(top_k)
        if least is None:
            return None
        x, factors, ids = hidden.contiguous(), topk_weights.float().contiguous(), topk_ids.contiguous()
        out = torch.empty_like(x)
        call = LayerCall(
            x, w13, w2, factors, ids, self._slots, shape, self._activation, Combine.DETERMINISTIC, out, None
        )
        if _profiler_enabled() or profiler._is_profiler_enabled:
            with record_function("epfuse::experts"):
                run_experts(call, least)
        else:
            run_experts(call, least)
        return out

    def _same(self, tensor: torch.Tensor | None, shape: torch.Size) -> bool:
        """Whether a parameter is like the one that was checked."""
        if type(tensor) is not nn.Parameter or tensor.shape != shape or tensor.dtype != self._dtype:
            return False
        return tensor.device == _CPU and tensor.is_contiguous() and not tensor.is_neg()

    def _way(self, top_k: int) -> _Way:
        shape = LayerShape(*self._sizes, top_k)
        asked = environment().path if self._path is Path.AUTO else self._path
        kept = frozenset({WeightFormat.DENSE})
        kind = asked, target_of(_CPU), shape, kept, self._dtype, Combine.DETERMINISTIC, type(self._activation)
        decision = table_of(*kind, Bias.NONE, device_name(_CPU)).at(1)  # a CPU's are the same for any T
        tiles = decision.tiles if decision.family is CPU else None
        way = self._ways[top_k] = _Way(shape, None if tiles is None else tiles.block_m)
        return way
