"""What a layer's plan is made from, and what it says."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from epfuse.arguments import checks_enums, integer, shown
from epfuse.config import Activation, Bias, LayerShape, Path, Policy, SwiGLUOAI, WeightFormat
from epfuse.errors import ConfigError
from epfuse.expert_map import experts_of_rank
from epfuse.families.family import CallKind
from epfuse.families.registry import readable_formats, why_portable
from epfuse.policy.decision import Decision
from epfuse.target import Target
from epfuse.weights.checkpoint_format import Checkpoint


class Storage(enum.Enum):
    """What a layer's experts keep in memory."""

    UNTOUCHED = "untouched"
    """Whatever the caller would keep without epfuse: the layer is none of the policy's business."""
    BF16 = "bf16"
    MXFP8 = "mxfp8"
    """In the order that the target reads (`ExpertWeights.prepare`)."""
    HYBRID = "hybrid"
    """MXFP8, and a BF16 copy beside it."""
    BLOCK_FP8 = "block_fp8"
    """E4M3 values with a float32 scale per block of 128x128, as the checkpoint has them."""

    @checks_enums
    def bytes_of(self, shape: LayerShape, activation: type[Activation] = SwiGLUOAI, bias: Bias = Bias.NONE) -> int:
        """Bytes of one rank's experts in one layer: weights, their scales, and biases in float32.

        Args:
            shape: the sizes.
            activation: whether there are gate rows: 3*H*I weights an expert, or 2*H*I.
            bias: of both projections or none.
        """
        hidden, width, rows = shape.hidden, shape.intermediate, activation.inputs * shape.intermediate
        weights = (rows + width) * hidden
        bf16, mxfp8 = 2 * weights, weights + rows * -(-hidden // 32) + hidden * -(-width // 32)
        blocks = -(-rows // 128) * -(-hidden // 128) + -(-hidden // 128) * -(-width // 128)
        expert = {
            Storage.UNTOUCHED: 0,
            Storage.BF16: bf16,
            Storage.MXFP8: mxfp8,
            Storage.HYBRID: bf16 + mxfp8,
            Storage.BLOCK_FP8: weights + 4 * blocks,
        }[self]
        biases = 0 if bias is Bias.NONE or self is Storage.UNTOUCHED else 4 * (rows + hidden)
        return shape.local_experts * (expert + biases)

    def formats(self, kind: CallKind) -> frozenset[WeightFormat]:
        """The formats that the kernels of such calls find; MXFP8 stays as loaded where none reads its order so."""
        target = kind.target
        kept: set[WeightFormat] = set()
        if self in (Storage.MXFP8, Storage.HYBRID):
            made = _PREPARED.get(target, WeightFormat.MXFP8)
            read = readable_formats(replace(kind, path=Path.W8A16))
            kept.add(made if made in read else WeightFormat.MXFP8)
        if self in (Storage.BF16, Storage.HYBRID):
            kept.add(WeightFormat.DENSE)
        if self is Storage.BLOCK_FP8:
            kept.add(WeightFormat.BLOCK_FP8_FNUZ if target is Target.GFX942 else WeightFormat.BLOCK_FP8)
        return frozenset(kept)


_PREPARED = {Target.SM90: WeightFormat.FRAGMENT, Target.GFX942: WeightFormat.MXFP8_FNUZ}
"""What `ExpertWeights.prepare` makes of MXFP8, where it changes it."""


@checks_enums
@dataclass(frozen=True)
class LayerRequest:
    """All that a plan for one MoE layer of a model depends on.

    Args:
        target: where it runs.
        shape: the sizes of one rank's layer; its I is what one rank holds, a ``tp_size``-th of the model's.
        ep_size: P, the ranks that the experts are spread over.
        activation: of the experts.
        checkpoint: the numbers that the weights are loaded from.
        max_model_len: the longest sequence that will be served, tokens.
        layer: index of the layer in the model, dense layers counted.
        moe_layers: indices of all layers with experts; memory is shared by these.
        shared_experts: how many experts every token visits besides its K.
        tp_size: ranks that the width I of every expert is split over.
        hbm_bytes: memory of the GPU; None for no limit.
        stored: what the layer keeps, where that is settled already; None lets the policy choose.
        device_name: the product, as torch names it, for the tuned tables; None for the target's `REFERENCE_DEVICE`.
        rival: class of the experts that run the layer if epfuse does not; `auto` then takes it only where epfuse is
            known to be faster. None where nobody else would.
        bias: of both projections or none.
        beside: the sizes of further groups of experts in each of these layers, for other tokens; they are stored as
            the layer is and share its memory.

    Raises:
        ConfigError: the values contradict each other.
    """

    target: Target
    shape: LayerShape
    ep_size: int
    max_model_len: int
    layer: int
    moe_layers: tuple[int, ...]
    activation: Activation = field(default_factory=SwiGLUOAI)
    checkpoint: Checkpoint = Checkpoint.MXFP8
    shared_experts: int = 0
    tp_size: int = 1
    hbm_bytes: int | None = None
    stored: Storage | None = None
    device_name: str | None = None
    rival: str | None = None
    bias: Bias = Bias.NONE
    beside: tuple[LayerShape, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ep_size", "max_model_len", "tp_size"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=1))
        for name in ("layer", "shared_experts"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name, kind in (("shape", LayerShape), ("activation", Activation), ("moe_layers", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be a {kind.__name__}")
        held = {len(experts_of_rank(self.shape.experts, self.ep_size, rank)) for rank in (0, self.ep_size - 1)}
        if self.shape.local_experts not in held:
            raise ConfigError(
                f"ep_size is {self.ep_size}; the layer has L={self.shape.local_experts} of E={self.shape.experts}"
                f" experts, and a rank of {self.ep_size} holds {' or '.join(map(str, sorted(held)))}"
            )
        if self.layer not in self.moe_layers:
            raise ConfigError(f"layer is {self.layer}; it must be one of the layers with experts, {self.moe_layers}")
        if self.hbm_bytes is not None:
            object.__setattr__(self, "hbm_bytes", integer("hbm_bytes", self.hbm_bytes, least=1, most=2**63 - 1))

    @checks_enums
    def bytes_of(self, storage: Storage) -> int:
        """Bytes of this rank's experts in this layer, stored so, with those beside."""
        return sum(storage.bytes_of(shape, type(self.activation), self.bias) for shape in (self.shape, *self.beside))

    @property
    def model_intermediate(self) -> int:
        """I of the model, before it is split over ``tp_size`` ranks."""
        return self.shape.intermediate * self.tp_size

    @checks_enums
    def calls(self, storage: Storage, path: Path = Path.AUTO) -> CallKind:
        """What kind of calls the layer has, stored so."""
        activation, device = type(self.activation), self.device_name
        kind = CallKind(path, self.target, self.shape, activation=activation, bias=self.bias, device_name=device)
        return replace(kind, formats=storage.formats(kind))


@dataclass(frozen=True)
class TokenRange:
    """The token counts that one decision serves.

    Attributes:
        min_tokens: T from here.
        max_tokens: to here, included; None for no end.
        decision: what a call does.
    """

    min_tokens: int
    max_tokens: int | None
    decision: Decision


@checks_enums
@dataclass(frozen=True)
class LayerPlan:
    """How one layer keeps its weights and which path serves which token counts.

    Attributes:
        policy: whose plan it is.
        request: what it was made from.
        storage: what is kept; UNTOUCHED leaves the layer to the caller, and then there are no ranges.
        reason: for the storage, in a sentence or two; of an untouched layer, why it is.
        ranges: decisions by token count, from 1 on, without gaps.
        refused_storage: storages that were considered and are not taken, with one sentence each.
    """

    policy: Policy
    request: LayerRequest
    storage: Storage
    reason: str
    ranges: tuple[TokenRange, ...] = ()
    refused_storage: tuple[tuple[Storage, str], ...] = ()

    @property
    def is_untouched(self) -> bool:
        """Whether the layer is left as it is."""
        return self.storage is Storage.UNTOUCHED

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's experts in this layer."""
        return self.request.bytes_of(self.storage)

    @property
    def why_portable(self) -> str | None:
        """Why a GPU's own kernels don't run some of the calls, in a sentence; None if they do, or it has none."""
        kinds = [self.request.calls(self.storage, path) for path in dict.fromkeys(p.decision.path for p in self.ranges)]
        return next((why for kind in kinds if (why := why_portable(kind)) is not None), None)

    def at(self, tokens: int) -> Decision:
        """What a call with ``tokens`` tokens does.

        Raises:
            ConfigError: the layer is untouched, or ``tokens`` is less than 1.
        """
        if self.is_untouched:
            raise ConfigError(f"layer {self.request.layer} is untouched: {self.reason}")
        tokens = integer("tokens", tokens, least=1)
        return next(r.decision for r in self.ranges if r.max_tokens is None or tokens <= r.max_tokens)
