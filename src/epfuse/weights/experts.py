"""The weights of one rank's experts, in the formats that the paths read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from epfuse.arguments import checks_enums, integer, shown
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError, DeviceError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.numerics.e8m0 import ScaleRounding
from epfuse.numerics.fnuz import double_scales, normalize_to_fnuz_
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.operands import Span, require_apart, require_plain, span
from epfuse.target import Target, target_of
from epfuse.weights.block_fp8 import BlockFP8, BlockScale
from epfuse.weights.consistency import KINDS, check_pair, check_stack
from epfuse.weights.fragment import FragmentMXFP8, check_packable, pack, unpack
from epfuse.weights.panels import PanelStack, RowOrder
from epfuse.weights.row_fp8 import RowFP8, pack_rows

log = logging.getLogger(__name__)

Stack: TypeAlias = torch.Tensor | MXFP8 | FragmentMXFP8 | RowFP8 | BlockFP8
"""The matrices of all experts, ``[L, N, K]``."""
W = TypeVar("W", torch.Tensor, MXFP8, FragmentMXFP8, RowFP8, BlockFP8)

PREPARED_FOR = {
    WeightFormat.MXFP8_FNUZ: Target.GFX942,
    WeightFormat.BLOCK_FP8_FNUZ: Target.GFX942,
    WeightFormat.FRAGMENT: Target.SM90,
    WeightFormat.ROW_FP8: Target.SM90,
}
"""The formats that `ExpertWeights.prepare` makes, and the one target whose kernels read each."""

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Projections(Generic[W]):
    """Both projections of a layer's experts in one format.

    Args:
        w13: ``[L, 2I, H]``; rows 0..I-1 are gate, I..2I-1 are up.
        w2: ``[L, H, I]``.
    """

    w13: W
    w2: W


def expert_matrix(stack: Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix ``[N, K]`` as plain numbers, from any format; float32 and float64 hold every one exactly.

    (Block FP8 with scales that are no powers of two is exact in float64 only.)
    """
    if isinstance(stack, torch.Tensor):
        return stack[expert].to(dtype)
    if isinstance(stack, RowFP8 | BlockFP8):
        return stack.matrix(expert, dtype)
    return (unpack(stack, expert) if isinstance(stack, FragmentMXFP8) else stack[expert]).dequantize(dtype)


AnyProjections: TypeAlias = (
    Projections[torch.Tensor]
    | Projections[MXFP8]
    | Projections[FragmentMXFP8]
    | Projections[RowFP8]
    | Projections[BlockFP8]
)


def _consume(experts: Projections[MXFP8] | Projections[BlockFP8], became: WeightFormat) -> None:
    """Both projections, whichever's memory was taken: half a layer is of no use."""
    experts.w13.consume(became.value)
    experts.w2.consume(became.value)


def stack_rows(stack: Stack) -> int:
    """N of a stack ``[L, N, K]``."""
    return stack.rows if isinstance(stack, PanelStack) else stack.shape[1]


def stack_tensors(stack: Stack) -> list[torch.Tensor]:
    """What a stack lies in: the numbers or codes, then the scales if it has them."""
    if isinstance(stack, torch.Tensor):
        return [stack]
    return [stack.codes if isinstance(stack, PanelStack) else stack.values, stack.scales]


@dataclass(frozen=True)
class ExpertWeights:
    """What one rank holds of one layer, in one format or several.

    Build it with `dense`, `bf16`, `mxfp8`, `quantize`, `hybrid` or `block_fp8`.

    Attributes:
        local_experts: L.
        hidden: H.
        intermediate: I.
        dense_experts: plain numbers, row-major.
        mxfp8_experts: MXFP8 as checkpoints have it, or with E4M3FNUZ values after `prepare` for gfx942.
        fragment_experts: MXFP8 rearranged by `prepare` for Hopper.
        row_fp8_experts: the same with one scale a row, by `prepare` for Hopper's W8A8.
        block_fp8_experts: FP8 with a scale per 128x128 block.
    """

    local_experts: int
    hidden: int
    intermediate: int
    dense_experts: Projections[torch.Tensor] | None = None
    mxfp8_experts: Projections[MXFP8] | None = None
    fragment_experts: Projections[FragmentMXFP8] | None = None
    row_fp8_experts: Projections[RowFP8] | None = None
    block_fp8_experts: Projections[BlockFP8] | None = None

    def __post_init__(self) -> None:
        for name in ("local_experts", "hidden", "intermediate"):
            least = 0 if name == "local_experts" else 1
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        formats = {name: getattr(self, name) for name in KINDS if getattr(self, name) is not None}
        if not formats:
            raise ConfigError("weights are in no format at all; make them with ExpertWeights.dense, .mxfp8, ...")
        for name, experts in formats.items():
            if not isinstance(experts, Projections):
                raise ConfigError(f"{name} is a {type(experts).__name__}; it must be Projections(w13, w2)")
            for which, stack, rows, columns in (
                ("w13", experts.w13, 2 * self.intermediate, self.hidden),
                ("w2", experts.w2, self.hidden, self.intermediate),
            ):
                check_stack(f"{name}.{which}", stack, KINDS[name], (self.local_experts, rows, columns))
            check_pair(name, experts.w13, experts.w2)

    @classmethod
    def dense(cls, w13: torch.Tensor, w2: torch.Tensor) -> ExpertWeights:
        """Weights in BF16, FP16 or FP32; the tensors are kept, not copied.

        Args:
            w13: ``[L, 2I, H]`` contiguous; gate rows first, then up rows (not interleaved). L may be 0.
            w2: ``[L, H, I]`` contiguous, same dtype and device as w13.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: the two don't describe one layer.
        """
        for name, w, letters in (("w13", w13, "[L, 2I, H]"), ("w2", w2, "[L, H, I]")):
            require_plain(name, w)
            if w.dim() != 3:
                raise ShapeError(f"{name} has shape {tuple(w.shape)}; it must be three-dimensional: {letters}")
            if w.dtype not in DENSE_DTYPES:
                raise DtypeError(f"{name} has dtype {w.dtype}; it must be bfloat16, float16 or float32")
            if not w.is_contiguous():
                raise LayoutError(
                    f"{name} has strides {w.stride()}; it must be contiguous (call .contiguous() at load)"
                )
        if w13.dtype != w2.dtype:
            raise DtypeError(f"w13 is {w13.dtype} and w2 is {w2.dtype}; both must have one dtype")
        return cls(*_sizes(w13, w2), dense_experts=Projections(w13, w2))

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
        cls, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
    ) -> ExpertWeights:
        """MXFP8 weights; the tensors are kept, not copied. Call `prepare` once for a GPU's own order.

        Args:
            w13: ``[L, 2I, H]`` float8_e4m3fn, contiguous; gate rows first, then up rows. H a multiple of 32.
            w13_scale: ``[L, 2I, H / 32]`` E8M0 bytes, uint8 or float8_e8m0fnu.
            w2: ``[L, H, I]`` float8_e4m3fn, contiguous. I a multiple of 32.
            w2_scale: ``[L, H, I / 32]`` E8M0 bytes.

        Raises:
            ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: the four don't describe one layer.
        """
        for name, w in (("w13", w13), ("w13_scale", w13_scale), ("w2", w2), ("w2_scale", w2_scale)):
            require_plain(name, w)
            if w.dim() != 3:
                raise ShapeError(f"{name} has shape {tuple(w.shape)}; it must be three-dimensional")
        experts = Projections(_named("w13", w13, w13_scale), _named("w2", w2, w2_scale))
        return cls(*_sizes(w13, w2), mxfp8_experts=experts)

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
        w13 = MXFP8.quantize(weights.dense_experts.w13, rounding)
        w2 = MXFP8.quantize(weights.dense_experts.w2, rounding)
        return cls.mxfp8(w13.values, w13.scales, w2.values, w2.scales)

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
        packed = cls.mxfp8(w13, w13_scale, w2, w2_scale)
        assert packed.mxfp8_experts is not None
        stacks = packed.mxfp8_experts
        dense = Projections(stacks.w13.dequantize(torch.bfloat16), stacks.w2.dequantize(torch.bfloat16))
        return replace(packed, dense_experts=dense)

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
        packed = cls.mxfp8(w13, w13_scale, w2, w2_scale)
        assert packed.mxfp8_experts is not None
        stacks = packed.mxfp8_experts
        blocks = Projections(BlockFP8.quantize(stacks.w13, scale), BlockFP8.quantize(stacks.w2, scale))
        return replace(packed, mxfp8_experts=None, block_fp8_experts=blocks)

    @torch.inference_mode()  # their memory is written, whatever mode it was made in and whether it requires grad
    @checks_enums
    def prepare(self, target: Target | None = None, path: Path = Path.AUTO) -> ExpertWeights:
        """Bring FP8 weights into the form that ``target`` reads fastest, **in their own memory**, expert by expert.

        Use what is returned: weights whose form changes are consumed, and every later use of them raises. The tensors
        given to `mxfp8` hold other bytes afterwards: on Hopper rearranged (new memory is taken only for a
        matrix whose rows are no multiple of 64 or columns no multiple of 128), on gfx942 as E4M3FNUZ. Dense weights,
        and targets that read checkpoints' order, are left as they are. Weights that Hopper's order can't hold (a NaN, a
        block scale over 2^7) stay in checkpoints' order and run on the slower kernels; a warning is logged. W8A8's
        order holds all.

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
        if target is Target.GFX942:
            return self._prepare_fnuz()
        if target is not Target.SM90:
            return self
        return self._prepare_row_fp8() if path is Path.W8A8 else self._prepare_fragments()

    def _require_not_prepared_for_another(self, target: Target) -> None:
        """A GPU can't use what another one's order has made of the weights, and no order is made from another."""
        for form in self.kept:
            made_for = PREPARED_FOR.get(form, target)
            if target.is_gpu and made_for is not target:
                raise ConfigError(
                    f"weights are in {form.value}, prepared for {made_for.value}; {target.value} needs them as the"
                    " checkpoint has them: load them again"
                )

    def _prepare_fnuz(self) -> ExpertWeights:
        mxfp8, blocks = self.mxfp8_experts, self.block_fp8_experts
        # all refusals before anything is changed
        if mxfp8 is not None and mxfp8.w13.values.dtype == torch.float8_e4m3fn:
            for stack in (mxfp8.w13, mxfp8.w2):
                double_scales(stack.scales)
        else:
            mxfp8 = None
        if blocks is not None and blocks.w13.values.dtype == torch.float8_e4m3fn:
            for block in (blocks.w13, blocks.w2):
                block.check_fnuz()
        else:
            blocks = None
        changed: dict[str, Any] = {}
        if mxfp8 is not None:
            tensors = [(stack.values, stack.scales) for stack in (mxfp8.w13, mxfp8.w2)]
            _consume(mxfp8, WeightFormat.MXFP8_FNUZ)
            changed["mxfp8_experts"] = Projections(*(MXFP8(*normalize_to_fnuz_(*pair)) for pair in tensors))
        if blocks is not None:
            changed["block_fp8_experts"] = Projections(blocks.w13.to_fnuz_(), blocks.w2.to_fnuz_())
        return replace(self, **changed) if changed else self

    def _prepare_fragments(self) -> ExpertWeights:
        if self.mxfp8_experts is None:
            return self
        stacks = self.mxfp8_experts
        try:
            for stack in (stacks.w13, stacks.w2):
                check_packable(stack)
        except ConfigError as reason:
            log.warning("MXFP8 weights stay in checkpoint order: %s", reason)
            return self
        fragments = Projections(pack(stacks.w13, RowOrder.GATE_UP), pack(stacks.w2, RowOrder.PLAIN))
        _consume(stacks, WeightFormat.FRAGMENT)
        return replace(self, mxfp8_experts=None, fragment_experts=fragments)

    def _prepare_row_fp8(self) -> ExpertWeights:
        if self.mxfp8_experts is None:
            return self
        stacks = self.mxfp8_experts
        packed = Projections(pack_rows(stacks.w13, RowOrder.GATE_UP), pack_rows(stacks.w2, RowOrder.PLAIN))
        _consume(stacks, WeightFormat.ROW_FP8)
        return replace(self, mxfp8_experts=None, row_fp8_experts=packed)

    @property
    def kept(self) -> dict[WeightFormat, AnyProjections]:
        """The weights in every format that is kept."""
        found: dict[WeightFormat, AnyProjections] = {}
        if self.mxfp8_experts is not None:
            fnuz = self.mxfp8_experts.w13.values.dtype == torch.float8_e4m3fnuz
            found[WeightFormat.MXFP8_FNUZ if fnuz else WeightFormat.MXFP8] = self.mxfp8_experts
        if self.fragment_experts is not None:
            found[WeightFormat.FRAGMENT] = self.fragment_experts
        if self.block_fp8_experts is not None:
            fnuz = self.block_fp8_experts.w13.values.dtype == torch.float8_e4m3fnuz
            found[WeightFormat.BLOCK_FP8_FNUZ if fnuz else WeightFormat.BLOCK_FP8] = self.block_fp8_experts
        if self.dense_experts is not None:
            found[WeightFormat.DENSE] = self.dense_experts
        if self.row_fp8_experts is not None:  # last: it has lost some bits
            found[WeightFormat.ROW_FP8] = self.row_fp8_experts
        return found

    def spans(self) -> list[tuple[str, Span]]:
        """Where the weights lie, each tensor with its name."""
        found: list[tuple[str, Span]] = []
        for experts in self.kept.values():
            for name, stack in (("w13", experts.w13), ("w2", experts.w2)):
                named = zip((name, f"{name}'s scales"), stack_tensors(stack), strict=False)
                found += [(part, span(tensor)) for part, tensor in named]
        return found

    @property
    def reference_experts(self) -> AnyProjections:
        """The format that the reference reads: what the checkpoint had, where it is kept."""
        return next(iter(self.kept.values()))

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.reference_experts.w13.device

    @property
    def activation_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the activations may have: the dense weights', else any (the kernels of FP8 take BF16)."""
        return DENSE_DTYPES if self.dense_experts is None else (self.dense_experts.w13.dtype,)

    @property
    def nbytes(self) -> dict[WeightFormat, int]:
        """Bytes of each format that is kept, scales included."""
        return {form: experts.w13.nbytes + experts.w2.nbytes for form, experts in self.kept.items()}


def _sizes(w13: torch.Tensor, w2: torch.Tensor) -> tuple[int, int, int]:
    """(L, H, I), if the two describe one layer."""
    if w13.device != w2.device:
        raise DeviceError(f"w13 is on {w13.device} and w2 on {w2.device}; both must be on one device")
    local, twice, hidden = w13.shape
    if twice % 2 or min(twice, hidden) == 0:
        raise ShapeError(f"w13 has shape {tuple(w13.shape)}; it must be [L, 2I, H] with I and H at least 1")
    expected = (local, hidden, twice // 2)
    if tuple(w2.shape) != expected:
        raise ShapeError(
            f"w2 has shape {tuple(w2.shape)}; beside w13 {tuple(w13.shape)} it must be [L, H, I] = {expected}"
        )
    return local, hidden, twice // 2


def _named(name: str, values: torch.Tensor, scales: torch.Tensor) -> MXFP8:
    """MXFP8, its errors in the caller's words."""
    if values.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"{name} has dtype {values.dtype}; it must be float8_e4m3fn")
    try:
        return MXFP8(values, scales)
    except EpfuseError as error:
        raise type(error)(f"{name}, {name}_scale: {error}") from error
