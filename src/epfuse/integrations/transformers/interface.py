"""`register`: "epfuse" as one of transformers' experts implementations.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="epfuse")

A module keeps its parameters, its names and its bytes: epfuse reads them where they are, and holds on to none of them
between calls, so that who moves, offloads or drops a module gets its memory back. What epfuse makes from them is kept
here, beside the modules, and goes with them.
"""

from __future__ import annotations

import enum
import functools
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums, member
from epfuse.config import Activation, Bias, Path
from epfuse.errors import EpfuseError, LayoutError, UnsupportedTarget
from epfuse.expert_map import ExpertMap
from epfuse.integrations.transformers.activation import activation_of, said_of
from epfuse.integrations.transformers.direct import DirectCall
from epfuse.integrations.transformers.layout import check_in_place, layout_of, names_of
from epfuse.integrations.transformers.read import checked_weights_of, scales_of, second_layout, weights_of
from epfuse.operands import is_integer, wide_ids
from epfuse.target import target_of
from epfuse.weights.experts import ExpertWeights

log: logging.Logger = logging.getLogger(__name__)
NAME = "epfuse"

UNTRACED = (
    "what epfuse knows of a module is no part of a traced graph: torch.compile breaks the graph there (without"
    " fullgraph=True), torch.export and torch.jit.trace record transformers' own experts"
)

Forward = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Layout(enum.Enum):
    """In which order FP8 weights are read on a GPU that has one of its own. Dense weights have none."""

    OWN = "own"
    """The kernels': the fastest ones, on a second copy that is made at a module's first call. Transposed or interleaved
    weights are copied too."""
    CHECKPOINT = "checkpoint"
    """The module's own tensors, by the portable kernels; no second copy. On MI300X and MI325X, whose FP8 is another
    one, W8A16 alone. Transposed and interleaved weights are left to transformers."""


def register(path: Path = Path.AUTO, layout: Layout = Layout.OWN) -> None:
    """Make "epfuse" an experts implementation of transformers, of dense and of FP8 experts.

    Then ``experts_implementation="epfuse"`` works in ``from_pretrained`` and ``from_config``, and
    ``set_experts_implementation("epfuse")`` in a loaded model; "eager" or "grouped_mm" switches back. A second call
    replaces the settings of the first.

    A module that epfuse doesn't compute, a GPU that it has no kernels for, or a call that wants gradients (a plain
    forward outside ``torch.no_grad()``) runs as transformers would run it by default; one warning says why.

    Args:
        path: how to compute; AUTO lets the policy choose.
        layout: whether FP8 weights may be copied into a GPU's own order, and transposed or interleaved weights into the
            one that kernels read. The copy lies beside the module, on its device, takes as many bytes as those weights,
            and goes when the module goes or `forget` is called.

    Raises:
        ConfigError: path or layout is of another type.
        ImportError: transformers is not installed, or older than 5.
    """
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    settings = _Settings(member("path", path, Path), member("layout", layout, Layout))
    forget()
    _watch_optimizers()
    for interface in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        interface.register(NAME, _forward_of(interface, settings))


def forget() -> None:
    """Drop what was made from modules' weights: second layouts and converted scales. The next call makes them anew.

    Call it after writing to weights where torch does not count it: through ``.data``, NumPy or DLPack, or to a tensor
    made in inference mode. After a step of an optimizer of torch's it happens by itself.
    """
    _STATES.clear()


@functools.cache
def _watch_optimizers() -> None:
    """Forget after every optimizer's step: torch counts no write of a fused one."""
    register_optimizer_step_post_hook(lambda *_: forget())


@checks_enums
@dataclass(frozen=True)
class _Settings:
    path: Path
    layout: Layout


@dataclass
class _State:
    """What is known of a module.

    Attributes:
        activation: of its experts; None where ``refused`` says why it has none of ours.
        said: what the module said of it then; nothing where it is None, for an act_fn may hold its module.
        refused: why transformers runs it.
        tensors: which tensors the rest was found out from, and how often those had been written by then.
        scales: of FP8 weights, as epfuse reads them.
        second: the weights in the device's own order, where it has one.
        plain: whether `checked_weights_of` may read the module.
        expert_map: all of the module's experts.
        direct: how to call a plain module on a CPU.
    """

    activation: Activation | None = None
    said: tuple[object, ...] = ()
    refused: str | None = None
    tensors: tuple[object, ...] = ()
    scales: tuple[torch.Tensor, ...] = ()
    second: ExpertWeights | None = None
    plain: bool = False
    expert_map: ExpertMap | None = None
    direct: DirectCall | None = None

    def still_says(self, module: nn.Module) -> bool:
        """Whether a module with an activation of ours has the one that it had."""
        return self.activation is None or said_of(module) == self.said


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
_FINDING: threading.RLock = threading.RLock()
"""Held while a module is found out about: another thread that calls it must see all of it or nothing."""


def _forward_of(interface: Any, settings: _Settings) -> Forward:
    """The function that transformers calls in place of a module's forward."""

    def forward(
        module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        operands = (hidden_states, top_k_index, top_k_weights)
        if torch._C._is_tracing() or torch.compiler.is_compiling():  # torch.export calls it all the same
            return _default(interface, module, UNTRACED)(module, *operands)
        wanted = _wants_gradients(module, hidden_states, top_k_weights)
        if wanted is not None:
            return _default(interface, module, wanted)(module, *operands)
        known = _STATES.get(module)
        if known is not None and known.direct is not None and known.still_says(module):
            try:
                result = known.direct(module, *operands)
            except UnsupportedTarget as reason:  # before anything is computed
                return _default(interface, module, str(reason))(module, *operands)
            if result is not None:
                return result
        state = _state_of(module, settings)
        if state.activation is None or state.expert_map is None:
            return _default(interface, module, state.refused or "")(module, *operands)
        if not is_integer(top_k_index):
            return _default(interface, module, f"expert ids are {top_k_index.dtype}, no integers")(module, *operands)
        weights = state.second or (checked_weights_of if state.plain else weights_of)(module, state.scales)
        # as grouped_mm does where autocast left another dtype
        own = weights.activation_dtypes
        x = hidden_states if hidden_states.dtype in own else hidden_states.to(own[0])
        try:
            result = fused_experts(
                x.contiguous(),
                weights,
                top_k_weights.float().contiguous(),
                wide_ids(top_k_index).contiguous(),
                state.expert_map,
                activation=state.activation,
                path=settings.path,
            )
        except UnsupportedTarget as reason:  # before anything is launched
            return _default(interface, module, str(reason))(module, *operands)
        return result.to(hidden_states.dtype)

    untraced = cast(Forward, torch.compiler.disable(forward, reason=UNTRACED))  # type: ignore[no-untyped-call]

    def epfuse_experts_forward(
        module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # what breaks a graph takes its time, and where no frame is looked at there is none to break
        plain = not torch.compiler.is_dynamo_compiling() and get_eval_frame_callback() is None
        return (forward if plain else untraced)(module, hidden_states, top_k_index, top_k_weights)

    return epfuse_experts_forward


def _wants_gradients(module: nn.Module, *inputs: torch.Tensor) -> str | None:
    """Why a backward pass may come, in a sentence."""
    if not torch.is_grad_enabled():
        return None
    held = [tensor for tensor in _tensors_of(module) if isinstance(tensor, torch.Tensor)]
    if not any(tensor.requires_grad for tensor in (*inputs, *module.parameters(recurse=False), *held)):
        return None
    return "gradients are on, and an input or a weight requires one; epfuse has no backward (torch.no_grad() says so)"


def _default(interface: Any, module: nn.Module, why: str) -> Forward:
    """What transformers runs where nobody asks for anything else."""
    _warn_once(f"{type(module).__name__} runs as transformers would run it by default, not on epfuse: {why}")
    scheme, weights = getattr(module, "activation_scheme", "dynamic"), names_of(module).weights
    doubles = any(getattr(getattr(module, name, None), "dtype", None) is torch.float64 for name in weights)
    if scheme == "static" or doubles:  # its grouped_mm refuses them
        return cast(Forward, inspect.unwrap(type(module).forward))
    return cast(Forward, interface["grouped_mm"])


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    log.warning(text)


def _state_of(module: nn.Module, settings: _Settings) -> _State:
    """What is known of a module with its present tensors and activation."""
    tensors = tuple([_identity(tensor) for tensor in _tensors_of(module)])
    state = _STATES.get(module)
    if state is not None and tensors == state.tensors and state.still_says(module):
        return state
    with _FINDING:
        state = _STATES.get(module)
        if state is None or tensors != state.tensors or not state.still_says(module):
            activation = state.activation if state is not None and state.still_says(module) else None
            state = None
            _STATES.pop(module, None)  # before the next is made: two second layouts at once may not fit
            _STATES[module] = state = _found(module, tensors, activation, settings)
    return state


def _tensors_of(module: nn.Module) -> list[torch.Tensor | None]:
    """Weights, biases and scales: parameters, else what FSDP, DataParallel or a buffer put in their place."""
    own = module.__dict__
    parameters, buffers, found = own["_parameters"], own["_buffers"], []
    for name in names_of(module).all:
        tensor = parameters.get(name)
        if tensor is None:
            tensor = own.get(name)
            if tensor is None:
                tensor = buffers.get(name)
        found.append(tensor)
    return found


def _found(
    module: nn.Module, tensors: tuple[object, ...], activation: Activation | None, settings: _Settings
) -> _State:
    """All that is to be known of a module; ``activation`` is what it had with other tensors."""
    state, names = _State(tensors=tensors, activation=activation), names_of(module)
    try:
        check_in_place("", module)
        if state.activation is None:
            state.activation = activation_of("experts", module)
        state.said = said_of(module)
        state.scales = scales_of(module)
        is_ours = layout_of(module).is_ours
        if not is_ours and settings.layout is Layout.CHECKPOINT:
            raise LayoutError(
                "its weights are transposed or interleaved, which kernels read from a copy alone, and"
                " register(layout=Layout.CHECKPOINT) does without one"
            )
        weights = weights_of(module, state.scales)
        if settings.layout is Layout.OWN:
            second = second_layout(weights, target_of(weights.device), state.activation)
            state.second = None if is_ours and second is weights else second
        whole = all(type(module._parameters.get(name)) is nn.Parameter for name in names.weights)
        state.plain = whole and is_ours and not state.scales and weights.bias is Bias.NONE
        state.expert_map = ExpertMap.all_local(weights.local_experts, weights.device)
        if state.plain and state.second is None and weights.device.type == "cpu":
            state.direct = DirectCall(names, weights, state.expert_map, state.activation, settings.path)
    except EpfuseError as reason:
        state.refused = str(reason)
    return state


def _identity(tensor: torch.Tensor | None) -> object:
    """What changes when a tensor's memory or contents do; writes in inference mode are not counted by torch.

    An address alone could be that of memory which was freed and given out again: a weak reference keeps its storage's
    name taken, and none of its bytes.
    """
    if tensor is None or type(tensor) not in (torch.Tensor, nn.Parameter):
        return type(tensor)
    written = -1 if tensor.is_inference() else tensor._version
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, tensor.storage_offset(), tensor.stride(), tuple(tensor.shape), tensor.dtype, written
