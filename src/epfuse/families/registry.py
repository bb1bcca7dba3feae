"""All families, and which of them serve a call; AUTO's order of preference."""

from __future__ import annotations

import torch

from epfuse.arguments import checks_enums, integer, member
from epfuse.config import Activation, Bias, Combine, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.errors import ConfigError
from epfuse.families.cpu import CPU
from epfuse.families.family import Family
from epfuse.families.portable import PORTABLE
from epfuse.families.portable_fp8 import PORTABLE_FP8
from epfuse.families.sm90 import SM90
from epfuse.families.sm90_fp8 import SM90_FP8
from epfuse.families.sm90_packed import SM90_PACKED
from epfuse.scratch import ScratchSize
from epfuse.stages.tiles import LayerTiles, TileRange
from epfuse.target import Target

FAMILIES: tuple[Family, ...] = (SM90, SM90_PACKED, SM90_FP8, PORTABLE, PORTABLE_FP8, CPU)
"""Best first: kernels of one GPU come before those for every GPU."""

PREFERENCE = (Path.W8A16, Path.BF16, Path.W8A8, Path.BLOCK_FP8)
"""The order in which AUTO prefers paths. FP8 activations come last: AUTO gives up accuracy only where the weights leave
no other choice."""

FP8_PATHS = frozenset({Path.W8A8, Path.BLOCK_FP8})
"""Paths that quantise the activations; the only ones that can sum routes by atomics."""


def _readable(target: Target, path: Path) -> tuple[WeightFormat, ...]:
    found = (form for family in FAMILIES for form in family.reads.get(target, {}).get(path, ()))
    return tuple(dict.fromkeys(found))


READABLE: dict[Target, dict[Path, tuple[WeightFormat, ...]]] = {
    target: {path: _forms for path in PREFERENCE if (_forms := _readable(target, path))} for target in Target
}
"""The paths of each target in AUTO's order, and the weights that each reads, best first."""


@checks_enums
def readable_formats(
    target: Target,
    path: Path,
    combine: Combine,
    activation: type[Activation] = SwiGLUOAI,
    bias: Bias = Bias.NONE,
) -> tuple[WeightFormat, ...]:
    """The weights whose kernels on a path activate, add biases and sum routes so, best first; none without a kernel.

    Arguments as of `Family.accepts`.
    """
    able = [
        family
        for family in FAMILIES
        if combine in family.combines and bias in family.biases and family.computes(activation)
    ]
    return tuple(
        form
        for form in READABLE[target].get(path, ())
        if any(form in family.reads.get(target, {}).get(path, ()) for family in able)
    )


@checks_enums
def takes_beside_fp8(target: Target, path: Path, dtype: torch.dtype) -> bool:
    """Whether any family on a path takes activations of a dtype where the weights are in FP8."""
    return any(path in family.reads.get(target, {}) and dtype in family.beside_fp8 for family in FAMILIES)


@checks_enums
def serving(
    target: Target,
    path: Path,
    form: WeightFormat,
    shape: LayerShape,
    dtype: torch.dtype,
    combine: Combine = Combine.DETERMINISTIC,
    activation: type[Activation] = SwiGLUOAI,
    bias: Bias = Bias.NONE,
) -> tuple[Family, ...]:
    """The families whose kernels such calls run; a call's tiles say which of them. Arguments as of `Family.accepts`."""
    call = (target, path, form, shape, dtype, combine, activation, bias)
    found = tuple(family for family in FAMILIES if family.accepts(*call) is None)
    return tuple(family for family in found if not family.every_gpu) or found


@checks_enums
def why_portable(
    target: Target, path: Path, shape: LayerShape, dtype: torch.dtype, activation: type[Activation], bias: Bias
) -> str | None:
    """Why a GPU's own kernels don't run such calls, in a sentence; None if they do, or the path has none there."""
    call = shape, dtype, Combine.DETERMINISTIC, activation, bias
    refusals = [
        family.accepts(target, path, form, *call)
        for family in FAMILIES
        if not family.every_gpu
        for form in family.reads.get(target, {}).get(path, ())
    ]
    return None if None in refusals else next(iter(refusals), None)


@checks_enums
def family_of(path: Path, form: WeightFormat, tiles: LayerTiles) -> Family:
    """The family whose kernels take such tiles.

    Raises:
        ConfigError: none that reads these weights does.
    """
    readers = [family for family in FAMILIES if any(form in paths.get(path, ()) for paths in family.reads.values())]
    for family in readers:
        if type(tiles.gate_up) is type(tiles.down) is family.tile:
            return family
    known = " or ".join(dict.fromkeys(family.tile.__name__ for family in readers)) or "nothing"
    raise ConfigError(
        f"tiles {tiles.key} are {type(tiles.gate_up).__name__} and {type(tiles.down).__name__}; the kernels of"
        f" {path.value} that read {form.value} weights take {known}"
    )


@checks_enums
def default_ranges(
    target: Target,
    path: Path,
    form: WeightFormat,
    shape: LayerShape,
    dtype: torch.dtype,
    activation: type[Activation] = SwiGLUOAI,
    bias: Bias = Bias.NONE,
) -> tuple[TileRange, ...]:
    """Default tiles of a path, by expected rows per expert, ascending; the last range has no end.

    Arguments as of `Family.accepts`.
    """
    families = serving(target, path, form, shape, dtype, activation=activation, bias=bias)
    found = [entry for family in families for entry in family.defaults(target, form, shape, dtype)]
    return tuple(sorted(found, key=lambda entry: entry.max_rows))


def scratch_size(path: Path, tokens: int, top_k: int, hidden: int, intermediate: int) -> ScratchSize:
    """Elements of `Scratch` that a call on ``path`` needs, whatever family runs it; ascending in ``tokens``.

    Args:
        path: what runs; AUTO takes what is enough for any path.
        tokens: T.
        top_k: K.
        hidden: H.
        intermediate: I.

    Raises:
        ConfigError: path is no `Path`, or a size is no integer or out of range (T may be 0).
    """
    path = member("path", path, Path)
    tokens, top_k = integer("tokens", tokens), integer("top_k", top_k, least=1)
    hidden, intermediate = integer("hidden", hidden, least=1), integer("intermediate", intermediate, least=1)
    sizes = [
        family.scratch(tokens, top_k, hidden, intermediate)
        for family in FAMILIES
        if path is Path.AUTO or any(path in paths for paths in family.reads.values())
    ]
    return ScratchSize(max((size.y for size in sizes), default=0), max((size.routed for size in sizes), default=0))
