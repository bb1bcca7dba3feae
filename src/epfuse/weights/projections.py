"""What a format of expert weights is: both projections of a layer, and what the rest asks of each format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError, DeviceError, DtypeError, ShapeError
from epfuse.numerics.consumable import Consumable, require_as_loaded
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.numerics.stack import ExpertStack
from epfuse.target import Target

Stack: TypeAlias = torch.Tensor | ExpertStack
"""The matrices of all experts, ``[L, N, K]``: a plain tensor, or what a format makes of it."""
S = TypeVar("S", bound=torch.Tensor | ExpertStack)
C = TypeVar("C", bound=Consumable)

Part: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Size and dtype of one of a stack's tensors."""
Forms: TypeAlias = Mapping[WeightFormat, Target | None]
"""The names of a format -> the one target whose kernels read it, None if it is as checkpoints have it."""


def expert_matrix(stack: Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix ``[N, K]`` as plain numbers, from any format; float32 and float64 hold every one exactly.

    (Block FP8 with scales that are no powers of two is exact in float64 only.)
    """
    return stack[expert].to(dtype) if isinstance(stack, torch.Tensor) else stack.matrix(expert, dtype)


def stack_tensors(stack: Stack) -> tuple[torch.Tensor, ...]:
    """What a stack lies in: the numbers or codes, then the scales if it has them."""
    return (stack,) if isinstance(stack, torch.Tensor) else stack.tensors()


@dataclass(frozen=True)
class Projections(ABC, Generic[S]):
    """Both projections of a layer's experts in one format. A format is a subclass; `epfuse.weights.formats` finds it.

    Args:
        w13: ``[L, 2I, H]``; rows 0..I-1 are gate, I..2I-1 are up. ``[L, I, H]`` of experts without a gate.
        w2: ``[L, H, I]``, which tells I.

    Attributes:
        stack: what w13 and w2 are.
        forms: the names of the format.
            More than one name where E4M3FNUZ in place of E4M3FN is a format of its own.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, LayoutError: the two don't describe one layer, or their bytes
            mean something else by now.
    """

    w13: S
    w2: S

    stack: ClassVar[type[Any]]
    forms: ClassVar[Forms]

    def __post_init__(self) -> None:
        for name, one in (("w13", self.w13), ("w2", self.w2)):
            if not isinstance(one, self.stack):
                wanted = "torch.Tensor" if self.stack is torch.Tensor else self.stack.__name__
                raise ConfigError(f"{name} is a {type(one).__name__}; it must be a {wanted}")
        self.check()
        for name, one in (("w13", self.w13), ("w2", self.w2)):
            if len(one.shape) != 3:
                raise ShapeError(f"{name} has shape {tuple(one.shape)}; it must be three-dimensional")
        first, second = stack_tensors(self.w13)[0], stack_tensors(self.w2)[0]
        if first.dtype != second.dtype:
            raise DtypeError(f"w13 is in {first.dtype} and w2 in {second.dtype}; both must have one dtype")
        if first.device != second.device:
            raise DeviceError(f"w13 is on {first.device} and w2 on {second.device}; both must be on one device")
        local, rows, hidden = self.w13.shape
        gated, ungated = (local, hidden, rows // 2), (local, hidden, rows)
        if min(rows, hidden) == 0 or (rows % 2 and tuple(self.w2.shape) != ungated):
            raise ShapeError(f"w13 has shape {tuple(self.w13.shape)}; it must be [L, 2I, H] with I and H at least 1")
        if tuple(self.w2.shape) not in (gated, ungated):
            raise ShapeError(
                f"w2 has shape {tuple(self.w2.shape)}; beside w13 {tuple(self.w13.shape)} it must be [L, H, I] ="
                f" {gated}, or {ungated} where there is no gate"
            )
        if self.forms[self.form] is None:
            for name, tensor in self.tensors():
                require_as_loaded(name, tensor)

    def check(self) -> None:
        """Refuse what is no stack of this format, beyond what every format asks; before anything else is read.

        Raises:
            EpfuseError: as said.
        """

    @property
    def form(self) -> WeightFormat:
        """The name of the format that they are in."""
        return next(iter(self.forms))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(L, H, I)."""
        local, hidden, intermediate = self.w2.shape
        return local, hidden, intermediate

    @property
    def inputs(self) -> int:
        """Rows of w13 for one value between the projections: 2, gate and up, or 1 (`Activation.inputs`)."""
        rows: int = self.w13.shape[1]
        return rows // self.sizes[2]

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """All memory of the layer, each tensor with its name: w13's, then w2's."""
        return [
            (name if tensor is parts[0] else f"{name}'s scales", tensor)
            for name, parts in (("w13", stack_tensors(self.w13)), ("w2", stack_tensors(self.w2)))
            for tensor in parts
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of both, scales included."""
        return self.w13.nbytes + self.w2.nbytes

    @classmethod
    @abstractmethod
    @checks_enums
    def parts(cls, form: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Part, ...]:
        """The tensors that a stack of ``[L, N, K]`` numbers lies in, in the order of `ExpertStack.tensors`.

        Args:
            form: one of ``forms``.
            size: (L, N, K).
            dtype: of the activations beside it; only dense weights follow it.
        """

    @classmethod
    def rebuilt(cls, tensors: Sequence[torch.Tensor], hidden: int, intermediate: int) -> Self:
        """The layer that lies in the tensors that `tensors` gave, on the same memory.

        Args:
            tensors: of w13, then of w2.
            hidden: H.
            intermediate: I.

        Raises:
            EpfuseError: they don't describe one layer.
        """
        half = len(tensors) // 2
        return cls(cls.stack(*tensors[:half]), cls.stack(*tensors[half:]))

    @classmethod
    def of_mxfp8(cls, w13: MXFP8, w2: MXFP8) -> Self | None:
        """The same numbers in this format, in new memory: what `verify` and the bench judge it by.

        Args:
            w13: ``[L, 2I, H]`` or ``[L, I, H]``, E4M3FN.
            w2: ``[L, H, I]``.

        Returns:
            None where MXFP8 becomes this by `prepare` alone, or not at all.
        """
        return None

    @checks_enums
    def check_prepare(self, target: Target) -> None:
        """Refuse what ``target``'s form can't hold, before the memory of any format is written.

        Raises:
            ConfigError: as said.
        """

    @checks_enums
    def prepared(self, target: Target, path: Path) -> Projections[Any]:
        """What ``target`` reads fastest on ``path``, in the memory of these, which are consumed.

        Itself where it is that already. `check_prepare` was asked.
        """
        return self


AnyProjections: TypeAlias = Projections[Any]


@dataclass(frozen=True)
class E4M3Projections(Projections[C]):
    """Formats whose codes are E4M3FN in checkpoints, and E4M3FNUZ once they are prepared for gfx942.

    ``forms`` has the two names in this order.
    """

    @property
    def form(self) -> WeightFormat:
        """The second name where the codes are E4M3FNUZ."""
        stored, fnuz = self.forms
        return fnuz if self.w13.values.dtype == torch.float8_e4m3fnuz else stored

    @classmethod
    @checks_enums
    def codes(cls, form: WeightFormat) -> torch.dtype:
        """Dtype of the codes in ``form``."""
        return torch.float8_e4m3fn if cls.forms[form] is None else torch.float8_e4m3fnuz

    @checks_enums
    def check_prepare(self, target: Target) -> None:
        """Scales must have a double for gfx942."""
        if target is Target.GFX942 and self.forms[self.form] is None:
            self.w13.check_fnuz()
            self.w2.check_fnuz()

    @checks_enums
    def prepared(self, target: Target, path: Path) -> Projections[Any]:
        """E4M3FNUZ for gfx942."""
        if target is Target.GFX942 and self.forms[self.form] is None:
            return type(self)(self.w13.to_fnuz_(), self.w2.to_fnuz_())
        return self
