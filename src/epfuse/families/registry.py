"""All families, and which of them serve a call; AUTO's order of preference."""

from __future__ import annotations

from importlib import import_module

from epfuse.arguments import checks_enums, integer, member
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError
from epfuse.families.family import CallKind, Family
from epfuse.scratch import ScratchSize
from epfuse.stages.tiles import LayerTiles, TileRange
from epfuse.target import Target

NAMES = (
    "sm90",
    "sm90_packed",
    "sm90_dense",
    "sm90_fp8_rows",
    "sm90_fp8",
    "sm90_block_fp8",
    "portable",
    "portable_fp8",
    "cpu",
)
"""Best first: kernels of one GPU come before those for every GPU. Each is a file of this folder, which has the family
as a constant of its name."""

FAMILIES: tuple[Family, ...] = tuple(getattr(import_module(f"epfuse.families.{name}"), name.upper()) for name in NAMES)
"""In the order of their names."""

PREFERENCE = (Path.W8A16, Path.BF16, Path.W8A8, Path.BLOCK_FP8)
"""The order in which AUTO prefers paths. FP8 activations come last: AUTO gives up accuracy only where the weights leave
no other choice."""

FP8_PATHS = frozenset({Path.W8A8, Path.BLOCK_FP8})
"""Paths that quantise the activations; the only ones that can sum routes by atomics."""


def _readable(target: Target, path: Path) -> tuple[WeightFormat, ...]:
    found = (form for family in FAMILIES for form in family.readable(target, path))
    return tuple(dict.fromkeys(found))


READABLE: dict[Target, dict[Path, tuple[WeightFormat, ...]]] = {
    target: {path: _forms for path in PREFERENCE if (_forms := _readable(target, path))} for target in Target
}
"""The paths of each target in AUTO's order, and the weights that each reads, best first."""


def readable_formats(kind: CallKind) -> tuple[WeightFormat, ...]:
    """The weights whose kernels on a path activate, add biases and sum routes so, best first; none without a kernel.

    Args:
        kind: of the calls, on one path; its sizes, dtype and formats are not asked.
    """
    target, path = kind.target, kind.path
    able = [
        family
        for family in FAMILIES
        if kind.combine in family.combines and kind.bias in family.biases and family.computes(kind.activation)
    ]
    return tuple(
        form for form in READABLE[target].get(path, ()) if any(form in family.readable(target, path) for family in able)
    )


def takes_beside_fp8(kind: CallKind) -> bool:
    """Whether any family on the calls' path takes their activations' dtype where the weights are in FP8."""
    return any(family.readable(kind.target, kind.path) and kind.dtype in family.beside_fp8 for family in FAMILIES)


def serving(kind: CallKind) -> tuple[Family, ...]:
    """The families whose kernels such calls run; a call's tiles say which of them.

    Args:
        kind: of the calls, on one path and one format.
    """
    found = tuple(family for family in FAMILIES if family.accepts(kind) is None)
    return tuple(family for family in found if not family.every_gpu) or found


def why_portable(kind: CallKind) -> str | None:
    """Why a GPU's own kernels don't run such calls, in a sentence; None if they do, or the path has none there.

    Args:
        kind: of the calls, on one path; of whatever formats these kernels read.
    """
    refusals = [
        family.accepts(kind.on(kind.path, form))
        for family in FAMILIES
        if not family.every_gpu
        for form in family.readable(kind.target, kind.path)
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


def default_ranges(kind: CallKind) -> tuple[TileRange, ...]:
    """Default tiles by expected rows per expert, ascending; the last range has no end.

    Args:
        kind: of the calls, on one path and one format.
    """
    found: dict[float, TileRange] = {}
    for family in serving(kind):
        for entry in family.defaults(kind):
            found.setdefault(entry.max_rows, entry)  # of two that end alike the family's that comes first
    return tuple(found[end] for end in sorted(found))


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
