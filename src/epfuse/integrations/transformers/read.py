"""The weights of a transformers experts module as `ExpertWeights`, over the module's own memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from epfuse.arguments import checks_enums
from epfuse.config import Activation, LayerShape, Path, WeightFormat
from epfuse.errors import DtypeError, LayoutError, ShapeError
from epfuse.integrations.transformers.layout import layout_of, names_of
from epfuse.numerics.e8m0 import decode_scales
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.policy import READABLE, CallKind, readable_formats
from epfuse.target import Target
from epfuse.weights.block_fp8 import BLOCK, BlockFP8, BlockFP8Experts
from epfuse.weights.dense import DENSE_DTYPES, DenseExperts
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.formats import PREPARED_FOR

_REARRANGED = {
    Target.SM90: frozenset({WeightFormat.MXFP8}),
    Target.GFX942: frozenset({WeightFormat.MXFP8, WeightFormat.BLOCK_FP8}),
}
"""What `ExpertWeights.prepare` rewrites."""
_E8M0 = (torch.float8_e8m0fnu, torch.uint8)


def scales_of(module: Any) -> tuple[torch.Tensor, ...]:
    """The scales of FP8 weights in the dtype that epfuse reads, converted where the module has another; none if dense.

    Args:
        module: one that `check_in_place` lets pass.

    Raises:
        DtypeError: another dtype of weights or scales.
        LayoutError: no scales, another block size, scales per 32 that are no powers of two, which MXFP8 can't hold.
        ShapeError: blocks of 128 in which gate and up rows meet.
    """
    names = names_of(module)
    first = names.weights[0]
    gate_up = getattr(module, first)
    if gate_up.dtype in DENSE_DTYPES:
        return ()
    if gate_up.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"{first} has dtype {gate_up.dtype}; it must be bfloat16, float16, float32 or E4M3")
    scales = {name: scale for name in names.scales if isinstance(scale := getattr(module, name, None), torch.Tensor)}
    if len(scales) < 2:
        raise LayoutError(f"{first} is in E4M3 and there is no {' and '.join(names.scales)}")
    block = tuple(module.block_size or ())
    if block not in ((1, GROUP), (BLOCK, BLOCK)):
        raise LayoutError(f"FP8 weights have a scale per {block or 'tensor'}; epfuse reads 1x{GROUP} and 128x128")
    if block == (BLOCK, BLOCK) and gate_up.shape[1] // 2 % BLOCK:
        raise ShapeError(
            f"I is {gate_up.shape[1] // 2}; the blocks of gate and up lie apart only at multiples of {BLOCK}"
        )
    convert = _bytes_of if block == (1, GROUP) else _numbers_of
    return tuple(convert(name, scale.detach().contiguous()) for name, scale in scales.items())


def weights_of(module: Any, scales: tuple[torch.Tensor, ...]) -> ExpertWeights:
    """What the module holds now; nothing is copied but transposed or interleaved weights.

    Args:
        module: one that `check_in_place` lets pass: dense, or FP8Experts with scales per 1x32 or 128x128 weights.
        scales: what `scales_of` made of the module's.

    Raises:
        ShapeError, DtypeError, LayoutError: the tensors don't describe one layer.
    """
    names, layout = names_of(module), layout_of(module)
    gate_up, down = (getattr(module, name).detach() for name in names.weights)
    biases = [None if bias is None else bias.detach() for bias in (getattr(module, n, None) for n in names.biases)]
    if not scales:
        return ExpertWeights.dense(gate_up, down, gate_up_bias=biases[0], down_bias=biases[1], layout=layout)
    if not layout.is_ours or biases != [None, None]:
        raise LayoutError("FP8 weights are transposed or interleaved, or have biases; epfuse reads dense ones so")
    if tuple(module.block_size) == (1, GROUP):
        return ExpertWeights.mxfp8(gate_up, scales[0], down, scales[1])
    return ExpertWeights((BlockFP8Experts(BlockFP8(gate_up, scales[0]), BlockFP8(down, scales[1])),))


def checked_weights_of(module: Any, scales: tuple[torch.Tensor, ...]) -> ExpertWeights:
    """The same, not checked again: a tenth of the time, at each call of a layer.

    Args:
        module: one that `weights_of` has read, whose tensors are still those: dense parameters of its own in our
            layout, without biases.
        scales: none.
    """
    assert not scales
    first, second = names_of(module).weights
    return ExpertWeights.of_checked(DenseExperts.of_checked(module._parameters[first], module._parameters[second]))


@checks_enums
def second_layout(weights: ExpertWeights, target: Target, activation: Activation) -> ExpertWeights:
    """FP8 weights in the order that ``target`` reads fastest, in memory of their own; as they are where it has none.

    Args:
        weights: as `weights_of` gives them; not changed.
        target: where they will be multiplied.
        activation: between them; not every kernel that reads such an order has it.

    Raises:
        ConfigError: as `ExpertWeights.prepare`.
    """
    if not _REARRANGED.get(target, frozenset()).intersection(weights.kept):
        return weights
    own = {form for form, made_for in PREPARED_FOR.items() if made_for is target}
    sizes = weights.hidden, weights.intermediate, weights.local_experts, weights.local_experts
    kind = CallKind(Path.AUTO, target, LayerShape(*sizes, top_k=1), activation=type(activation), bias=weights.bias)
    if not any(own.intersection(readable_formats(replace(kind, path=path))) for path in READABLE[target]):
        return weights
    copies = tuple(
        type(experts).rebuilt([part.clone() for _, part in experts.tensors()], weights.hidden, weights.intermediate)
        for experts in weights.formats
    )
    return ExpertWeights(copies).prepare(target)


def _bytes_of(name: str, scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes of scales that are powers of two."""
    if scales.dtype in _E8M0:
        return scales
    if scales.dtype != torch.float32:
        raise DtypeError(f"{name} has dtype {scales.dtype}; scales are float32 or E8M0")
    bits = scales.view(torch.int32)
    exponents = bits >> 23
    smallest = bits == 1 << 22  # 2^-127, subnormal in float32
    if not bool((((bits & 0x7FFFFF) == 0) & (exponents > 0) & (exponents < 255) | smallest).all()):
        raise LayoutError(f"{name} holds numbers that are no powers of two; a scale per {GROUP} must be one")
    return exponents.to(torch.uint8)


def _numbers_of(name: str, scales: torch.Tensor) -> torch.Tensor:
    """Float32 scales."""
    if scales.dtype not in (*_E8M0, torch.float32):
        raise DtypeError(f"{name} has dtype {scales.dtype}; scales are float32 or E8M0")
    if scales.dtype in _E8M0:
        return decode_scales(scales.view(torch.uint8), torch.float32)
    return scales
