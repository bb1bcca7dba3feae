"""The weights of one rank's experts, in the formats that the paths read.

Over 400 lines, two fifths of them docstrings: one public class, whose constructors are its documentation in one place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from epfuse.arguments import checks_enums, shown
from epfuse.config import Activation, Bias, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.errors import ConfigError, DeviceError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.numerics.e8m0 import ScaleRounding
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.operands import Span, require_apart, require_plain, span
from epfuse.target import Target, target_of
from epfuse.weights.biases import checked_bias
from epfuse.weights.block_fp8 import BlockFP8, BlockFP8Experts, BlockScale
from epfuse.weights.dense import DENSE_DTYPES, DenseExperts
from epfuse.weights.formats import FORMAT_OF, FORMATS, PREPARED_FOR
from epfuse.weights.layouts import OURS, GateUpRows, MatrixOrder, WeightLayout
from epfuse.weights.mxfp8 import MXFP8Experts
from epfuse.weights.projections import AnyProjections

K = TypeVar("K", bound=AnyProjections)


@dataclass(frozen=True)
class ExpertWeights:
    """What one rank holds of one layer, in one format or several.

    Build it with `dense`, `bf16`, `mxfp8`, `quantize`, `hybrid` or `block_fp8`.

    Args:
        formats: the same experts in each format that is kept, no format twice.
        gate_up_bias: ``[L, 2I]``, gate first (``[L, I]`` without a gate), contiguous, any floating dtype of dense
            weights; added in FP32 before the activation. None for none.
        down_bias: ``[L, H]``; added in FP32 to each local route's row, before the router weight multiplies it.

    Attributes:
        formats: what the reference reads first: the order of `epfuse.weights.formats.FORMATS`.
        gate_up_bias, down_bias: in float32; what was given is kept, not copied, where it is in float32.
        local_experts: L.
        hidden: H.
        intermediate: I.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: there is no format, one that is none, or they
            describe different layers.
    """

    formats: tuple[AnyProjections, ...]
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    local_experts: int = field(init=False)
    hidden: int = field(init=False)
    intermediate: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.formats, tuple) or not self.formats:
            raise ConfigError("weights are in no format at all; make them with ExpertWeights.dense, .mxfp8, ...")
        for experts in self.formats:
            if type(experts) not in FORMATS:
                known = ", ".join(kind.__name__ for kind in FORMATS)
                raise ConfigError(f"formats has a {type(experts).__name__}; it must hold some of {known}")
        # In the order of FORMATS. Not by its index(): torch 2.10's compiler does not trace that on classes.
        first, *rest = formats = tuple(experts for kind in FORMATS for experts in self.formats if type(experts) is kind)
        for experts in rest:
            if experts.form is first.form:
                raise ConfigError(f"formats has {first.form.value} twice; it must have each format once")
            if experts.sizes != first.sizes:
                raise ShapeError(
                    f"{experts.form.value} has (L, H, I) = {experts.sizes} and {first.form.value} {first.sizes}; all"
                    " formats must hold one layer"
                )
            if experts.w13.device != first.w13.device:
                raise DeviceError(
                    f"{experts.form.value} is on {experts.w13.device} and {first.form.value} on {first.w13.device}; all"
                    " formats must be on one device"
                )
            if experts.inputs != first.inputs:
                raise ShapeError(f"{experts.form.value} or {first.form.value} has a gate, and the other one has none")
        object.__setattr__(self, "formats", formats)
        for name, size in zip(("local_experts", "hidden", "intermediate"), first.sizes, strict=True):
            object.__setattr__(self, name, size)
        for name, outputs in (("gate_up_bias", first.w13.shape[1]), ("down_bias", self.hidden)):
            bias = checked_bias(name, getattr(self, name), (self.local_experts, outputs), self.device)
            object.__setattr__(self, name, bias)

    @classmethod
    def dense(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        layout: WeightLayout = OURS,
    ) -> ExpertWeights:
        """Weights in BF16, FP16 or FP32; the tensors are kept, not copied, unless they lie in another layout.

        Args:
            w13: ``[L, 2I, H]`` contiguous; gate rows first, then up rows (not interleaved). ``[L, I, H]`` of experts
                without a gate. L may be 0.
            w2: ``[L, H, I]`` contiguous, same dtype and device as w13.
            gate_up_bias: ``[L, 2I]``, rows in the order of w13's; as for the class. None for none.
            down_bias: ``[L, H]``; None for none.
            layout: how w13, w2 and gate_up_bias lie, if otherwise than said above: they are copied then.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: they don't describe one layer.
        """
        if not layout.is_ours:
            require_plain("w13", w13)
            require_plain("w2", w2)
            w13, w2 = layout.in_halves(layout.rows(w13)), layout.rows(w2)
        return _laid_out(DenseExperts(w13, w2), gate_up_bias, down_bias, layout)

    @classmethod
    def of_checked(cls, experts: AnyProjections) -> ExpertWeights:
        """Without biases, in one format, and not checked again: for who makes the same weights anew at each call."""
        found = cls.__new__(cls)
        local, hidden, intermediate = experts.sizes
        vars(found).update(formats=(experts,), local_experts=local, hidden=hidden, intermediate=intermediate)
        return found

    @classmethod
    def bf16(cls, w13: torch.Tensor, w2: torch.Tensor) -> ExpertWeights:
        """`dense` for BF16 only: refuses any other dtype rather than convert it silently.

        Args:
            w13: ``[L, 2I, H]`` bfloat16, contiguous; gate rows first, then up rows.
            w2: ``[L, H, I]`` bfloat16, contiguous, on the same device.

        Raises:
            DtypeError: a tensor has another dtype.
            ConfigError, ShapeError, DeviceError, LayoutError: as `dense`.
        """
        for name, w in (("w13", w13), ("w2", w2)):
            require_plain(name, w)
            if w.dtype != torch.bfloat16:
                raise DtypeError(f"{name} has dtype {w.dtype}; it must be bfloat16 (ExpertWeights.dense takes others)")
        return cls.dense(w13, w2)

    @classmethod
    def mxfp8(
        cls,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        layout: WeightLayout = OURS,
    ) -> ExpertWeights:
        """MXFP8 weights; the tensors are kept, not copied. Call `prepare` once for a GPU's own order.

        Args:
            w13: ``[L, 2I, H]`` float8_e4m3fn, contiguous; gate rows first, then up rows. ``[L, I, H]`` of experts
                without a gate. H a multiple of 32.
            w13_scale: ``[L, 2I, H / 32]`` E8M0 bytes, uint8 or float8_e8m0fnu.
            w2: ``[L, H, I]`` float8_e4m3fn, contiguous. I a multiple of 32.
            w2_scale: ``[L, H, I / 32]`` E8M0 bytes.
            gate_up_bias: ``[L, 2I]``, rows in the order of w13's; as for the class. None for none.
            down_bias: ``[L, H]``; None for none.
            layout: where gate and up rows alternate: w13, w13_scale and gate_up_bias are copied then. Matrices with
                scales along their rows are not transposed.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: they don't describe one layer.
        """
        if layout.matrices is not MatrixOrder.ROWS:
            raise LayoutError("layout has transposed matrices; MXFP8 has a scale for 32 numbers of a row of w13 and w2")
        first, second = _named("w13", w13, w13_scale), _named("w2", w2, w2_scale)
        if not layout.is_ours:
            first = MXFP8(layout.in_halves(first.values), layout.in_halves(first.scales))
        return _laid_out(MXFP8Experts(first, second), gate_up_bias, down_bias, layout)

    @classmethod
    @torch.no_grad()
    @checks_enums
    def quantize(cls, weights: ExpertWeights, rounding: ScaleRounding = ScaleRounding.FLOOR) -> ExpertWeights:
        """Dense weights as MXFP8, in new memory, one expert at a time.

        Args:
            weights: made by `dense`; H and I multiples of 32.
            rounding: rule of the shared exponent; FLOOR is that of MX v1.0.

        Raises:
            ConfigError: no dense weights are kept.
            ShapeError: H or I is not a multiple of 32.
        """
        if not isinstance(weights, ExpertWeights):
            raise ConfigError(f"weights is {shown(weights)}; it must be an epfuse.ExpertWeights")
        if weights.dense_experts is None:
            raise ConfigError(
                f"weights are in {', '.join(form.value for form in weights.kept)}; quantising takes dense"
            )
        for name, letter, size in (("w13", "H", weights.hidden), ("w2", "I", weights.intermediate)):
            if size % GROUP:
                raise ShapeError(f"{name} has rows of {letter}={size} weights; MXFP8 needs a multiple of {GROUP}")
        dense = weights.dense_experts
        packed = MXFP8Experts(MXFP8.quantize(dense.w13, rounding), MXFP8.quantize(dense.w2, rounding))
        return cls((packed,), weights.gate_up_bias, weights.down_bias)

    @classmethod
    def hybrid(
        cls, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
    ) -> ExpertWeights:
        """`mxfp8`, and BF16 copies beside it: three times the bytes, for a policy that uses both.

        Args:
            w13: ``[L, 2I, H]`` float8_e4m3fn, as `mxfp8` takes it; like the others kept, not copied.
            w13_scale: ``[L, 2I, H / 32]`` E8M0 bytes.
            w2: ``[L, H, I]`` float8_e4m3fn.
            w2_scale: ``[L, H, I / 32]`` E8M0 bytes.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: as `mxfp8`.
        """
        stacks = MXFP8Experts(_named("w13", w13, w13_scale), _named("w2", w2, w2_scale))
        dense = DenseExperts(stacks.w13.dequantize(torch.bfloat16), stacks.w2.dequantize(torch.bfloat16))
        return cls((stacks, dense))

    @classmethod
    @checks_enums
    def block_fp8(
        cls,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        *,
        scale: BlockScale = BlockScale.POWER_OF_TWO,
    ) -> ExpertWeights:
        """Convert MXFP8 weights to 128x128 block FP8, one expert at a time, in new memory.

        Args:
            w13: as `mxfp8` takes it; like the others left as it is, and free to be dropped afterwards.
            w13_scale: as `mxfp8` takes it.
            w2: as `mxfp8` takes it.
            w2_scale: as `mxfp8` takes it.
            scale: rule of the block scales.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: as `mxfp8`.
        """
        stacks = MXFP8Experts(_named("w13", w13, w13_scale), _named("w2", w2, w2_scale))
        return cls((BlockFP8Experts(BlockFP8.quantize(stacks.w13, scale), BlockFP8.quantize(stacks.w2, scale)),))

    @classmethod
    @checks_enums
    def without_data(
        cls,
        form: WeightFormat,
        shape: LayerShape,
        dtype: torch.dtype = torch.bfloat16,
        activation: type[Activation] = SwiGLUOAI,
        bias: Bias = Bias.NONE,
    ) -> ExpertWeights:
        """Weights on the meta device, as `epfuse aot` calls kernels with.

        Args:
            form: any format, prepared ones too.
            shape: L, H and I are read.
            dtype: of dense weights.
            activation: whether w13 has gate rows.
            bias: of both projections or none.
        """
        local, hidden, intermediate, kind = shape.local_experts, shape.hidden, shape.intermediate, FORMAT_OF[form]
        rows = activation.inputs * intermediate
        parts = [
            part
            for size in ((local, rows, hidden), (local, hidden, intermediate))
            for part in kind.parts(form, size, dtype)
        ]
        tensors = [torch.empty(size, dtype=of, device="meta") for size, of in parts]
        made = kind.rebuilt(tensors, hidden, intermediate)
        if bias is Bias.NONE:
            return cls((made,))
        return cls((made,), *(torch.empty(local, outputs, device="meta") for outputs in (rows, hidden)))

    @torch.inference_mode()  # their memory is written, whatever mode it was made in and whether it requires grad
    @checks_enums
    def prepare(self, target: Target | None = None, path: Path = Path.AUTO) -> ExpertWeights:
        """Bring FP8 weights into the form that ``target`` reads fastest, **in their own memory**, expert by expert.

        Use what is returned: weights whose form changes are consumed, and every later use of them raises. The tensors
        given to `mxfp8` hold other bytes afterwards: on Hopper rearranged (new memory is taken only for
        matrices whose rows are no multiple of 64 or columns no multiple of 128, or that begin at no multiple of 16
        bytes), on gfx942 as E4M3FNUZ. Dense weights, and targets that read checkpoints' order, are left as they are.
        Weights that Hopper's order can't hold (a NaN, a block scale over 2^7) stay in checkpoints' order and run on the
        slower kernels; a warning is logged. W8A8's order holds all. Experts without a gate stay as they are there, too.

        Args:
            target: None means the target of the device that the weights are on.
            path: what will run. On Hopper W8A8 has an order of its own, with one scale a row (weights/row_fp8.py),
                which no other path reads; anything else, and other targets, makes no difference.

        Raises:
            ConfigError: path or target is none; for gfx942, an MXFP8 scale byte is 254, whose double E8M0 can't hold;
                for a GPU, the weights were prepared for another one, or are consumed. Nothing is changed.
            LayoutError: two of the tensors share memory. Nothing is changed.
        """
        target = target_of(self.device) if target is None else target
        self._require_not_prepared_for_another(target)
        for index, (name, own) in enumerate(spans := self.spans()):
            require_apart(name, own, spans[:index])
        for experts in self.formats:
            experts.check_prepare(target)
        ready = tuple(experts.prepared(target, path) for experts in self.formats)
        return self if all(map(operator.is_, ready, self.formats)) else replace(self, formats=ready)

    def _require_not_prepared_for_another(self, target: Target) -> None:
        """A GPU can't use what another one's order has made of the weights, and no order is made from another."""
        for form in self.kept:
            made_for = PREPARED_FOR.get(form, target)
            if target.is_gpu and made_for is not target:
                raise ConfigError(
                    f"weights are in {form.value}, prepared for {made_for.value}; {target.value} needs them as the"
                    " checkpoint has them: load them again"
                )

    def held(self, kind: type[K]) -> K | None:
        """The weights in a format, by its class; None where they are not kept in it."""
        return next((experts for experts in self.formats if isinstance(experts, kind)), None)

    @property
    def dense_experts(self) -> DenseExperts | None:
        """Plain numbers."""
        return self.held(DenseExperts)

    @property
    def mxfp8_experts(self) -> MXFP8Experts | None:
        """MXFP8 as checkpoints have it, or with E4M3FNUZ values after `prepare` for gfx942."""
        return self.held(MXFP8Experts)

    @property
    def kept(self) -> dict[WeightFormat, AnyProjections]:
        """The weights in every format that is kept."""
        return {experts.form: experts for experts in self.formats}

    @checks_enums
    def without(self, form: WeightFormat) -> ExpertWeights:
        """The weights but for one format.

        Raises:
            ConfigError: no other one is kept.
        """
        return replace(self, formats=tuple(experts for experts in self.formats if experts.form is not form))

    @property
    def bias(self) -> Bias:
        """Whether a projection has a bias."""
        return Bias.NONE if self.gate_up_bias is None and self.down_bias is None else Bias.ADDED

    @property
    def biases(self) -> list[tuple[str, torch.Tensor]]:
        """The biases that there are, each with its name."""
        both = (("gate_up_bias", self.gate_up_bias), ("down_bias", self.down_bias))
        return [(name, bias) for name, bias in both if bias is not None]

    @property
    def inputs(self) -> int:
        """Rows of w13 for one value between the projections: 2, gate and up, or 1 (`Activation.inputs`)."""
        return self.formats[0].inputs

    def spans(self) -> list[tuple[str, Span]]:
        """Where the weights and biases lie, each tensor with its name."""
        kept = [part for experts in self.formats for part in experts.tensors()]
        return [(name, span(tensor)) for name, tensor in (*kept, *self.biases)]

    @property
    def reference_experts(self) -> AnyProjections:
        """The format that the reference reads: what the checkpoint had, where it is kept."""
        return next(iter(self.kept.values()))  # which asks each whether it is consumed

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self.formats[0].w13.device
        return device

    @property
    def activation_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the activations may have: the dense weights', else any (the kernels of FP8 take BF16)."""
        dense = self.dense_experts
        return DENSE_DTYPES if dense is None else (dense.w13.dtype,)

    @property
    def nbytes(self) -> dict[WeightFormat, int]:
        """Bytes of each format that is kept, scales included."""
        return {experts.form: experts.nbytes for experts in self.formats}


def _laid_out(
    experts: AnyProjections, gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, layout: WeightLayout
) -> ExpertWeights:
    """Weights that are in our layout by now, and biases, whose gate and up rows are still in ``layout``."""
    if layout.gate_up is GateUpRows.ALTERNATING:
        if experts.inputs != 2:
            raise LayoutError("layout has gate and up rows that alternate; these weights have no gate")
        if isinstance(gate_up_bias, torch.Tensor) and gate_up_bias.shape == experts.w13.shape[:2]:
            gate_up_bias = layout.in_halves(gate_up_bias)
    return ExpertWeights((experts,), gate_up_bias, down_bias)


def _named(name: str, values: torch.Tensor, scales: torch.Tensor) -> MXFP8:
    """MXFP8, its errors in the caller's words."""
    require_plain(name, values)
    require_plain(f"{name}_scale", scales)
    if values.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"{name} has dtype {values.dtype}; it must be float8_e4m3fn")
    try:
        return MXFP8(values, scales)
    except EpfuseError as error:
        raise type(error)(f"{name}, {name}_scale: {error}") from error
