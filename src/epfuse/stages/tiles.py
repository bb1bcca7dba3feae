"""Tiles of the two grouped GEMMs.

The two GEMMs of a layer share one RouteTable and so one block_m. It follows the rows that an expert can expect: a tile
taller than that computes padding, a shorter one reads the weights again for every block of rows.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, ClassVar

from pydantic import Field

from epfuse.config import LayerShape
from epfuse.errors import ConfigError

LARGEST = 1 << 24
"""No size in a table is as large."""
FEW_OUTPUTS = 8192
"""Outputs of down over all local experts up to which whole tiles leave multiprocessors without one: 128 of 64 rows."""
MOST_REMOTE = 16
"""E over L up to which layers were timed. A launch has programs, and memory for sums that they share, for all routes
that could be local; those of other ranks' routes return at once, but are launched all the same."""
LONG_K = 3072
"""H and I from which on each of eight programs that share a reduction has three steps."""
FEW_ROWS = 16
"""Rows that a persistent tile copies of a block's rest if it has no more."""


@dataclass(frozen=True)
class RouteTiles:
    """How the routing kernels cut the routes.

    Args:
        one_launch_routes: up to this many routes a program per expert looks at all of them (one launch); above it the
            routes are counted in chunks first (two launches, no program reads more than its chunk and the counts).
        count: routes that a program of the one launch looks at at a time, a power of two.
        chunk: routes of one program of the two launches, a power of two.
    """

    one_launch_routes: int = 4096
    count: int = 4096
    chunk: int = 128


@dataclass(frozen=True)
class GemmTile:
    """One program's tile of a grouped GEMM; the bounds hold for what is read from a table.

    Args:
        block_n: weight rows (output columns; in gate_up half of them are gate and half are up).
        block_k: reduction step.
        group_m: blocks of rows that are walked before the next block of columns; 0 for all of them.
        num_warps: warps (NVIDIA) or waves (AMD) of a program.
        num_stages: software pipeline depth of the loads.

    Attributes:
        for_both: whether it has to be both GEMMs' tile, because one launch may be for both.
    """

    for_both: ClassVar[bool] = False

    block_n: Annotated[int, Field(ge=16, le=LARGEST)]
    block_k: Annotated[int, Field(ge=16, le=LARGEST)]
    group_m: Annotated[int, Field(ge=0, le=LARGEST)]
    num_warps: Annotated[int, Field(ge=1, le=LARGEST)]
    num_stages: Annotated[int, Field(ge=1, le=LARGEST)]

    @property
    def key(self) -> str:
        """The tile in one word: ``NxK``, ``gGROUP_M``, warps, stages, then what differs from the class's defaults."""
        words = [f"{self.block_n}x{self.block_k}", f"g{self.group_m}", f"{self.num_warps}w", f"{self.num_stages}s"]
        extra = [f for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        return ".".join(words + [f"{f.name}={getattr(self, f.name)}" for f in extra])


@dataclass(frozen=True)
class Sm90Tile(GemmTile):
    """A tile of the Hopper kernels, with the weights on the M side of wgmma.

    block_n is a multiple of 64, block_k is 64 or 128 (128 for MXFP8 weights); num_stages counts K steps in the ring.

    Args:
        split_k: programs that share a tile's reduction, where there are too few tiles to fill the GPU.
        tail_split: programs that share the reduction of each tile after the last full wave of programs; not beside
            split_k. A block of 64 rows and more is then always multiplied whole.
        guess_bytes: of gate_up: how much of each weight row the first programs bring into L2 while the route table is
            being made, on the guess that every expert has rows; a multiple of 16, 0 for nothing.
    """

    split_k: Annotated[int, Field(ge=1, le=LARGEST)] = 1
    guess_bytes: Annotated[int, Field(ge=0, le=LARGEST, multiple_of=16)] = 0
    tail_split: Annotated[int, Field(ge=1, le=LARGEST)] = 1

    @property
    def shares(self) -> int:
        """Programs that share a tile's reduction, where any do."""
        return max(self.split_k, self.tail_split)

    def __post_init__(self) -> None:
        if self.split_k > 1 and self.tail_split > 1:
            raise ConfigError(f"tile {self.key}: split_k and tail_split don't go together")


@dataclass(frozen=True)
class Sm90PersistentTile(GemmTile):
    """A tile of the Hopper kernels with specialised warps, one program per multiprocessor.

    For MXFP8 weights in fragment order, both GEMMs in one launch; or for weights with one scale a row, block_k 128 and
    one part. block_n is a panel of 64 rows for each of two or three consumers; block_k is 64 or 128; num_warps counts
    one consumer's (4); num_stages counts K steps in the ring.

    Args:
        parts: parts of 128 k that weights are dequantised in; at least two if block_k is 64.
        head: rows of a block that are always copied, a power of two; the rest, another one, only as far as it has rows.
            0 for the largest power of two in the block.
    """

    for_both: ClassVar[bool] = True

    parts: Annotated[int, Field(ge=1, le=LARGEST)] = 2
    head: Annotated[int, Field(ge=0, le=LARGEST)] = 0

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply, a panel of 64 weight rows each."""
        return self.block_n // 64

    def rows_of(self, block_m: int) -> tuple[int, int]:
        """The rows of a block's head, and the rows of its rest."""
        head = self.head or 1 << block_m.bit_length() >> 1
        return head, block_m - head

    def cuts(self, block_m: int) -> bool:
        """Whether a block can be cut so: into one power of two, at least 16, or two, none below 8.

        One is also multiplied by half, and a wgmma has at least 8 columns.
        """
        head, rest = self.rows_of(block_m)
        return head >= 16 and _part(head) if rest == 0 else _part(head) and _part(rest)

    def __post_init__(self) -> None:
        if self.block_n not in (128, 192):
            raise ConfigError(f"block_n is {self.block_n}; a persistent tile's is 128 or 192")
        parts = {64: (2, 4), 128: (1, 2, 4)}
        if self.parts not in parts.get(self.block_k, ()):
            raise ConfigError(
                f"block_k is {self.block_k} and parts {self.parts}; of a persistent tile 64 goes with 2 or 4 parts, "
                "and 128 with 1, 2 or 4"
            )
        if self.head and not _part(self.head):
            raise ConfigError(f"head is {self.head}; a persistent tile's is a power of two, at least 8, or 0")


@dataclass(frozen=True)
class Sm90DenseTile(Sm90PersistentTile):
    """A persistent tile of dense weights, both GEMMs in one launch.

    block_n is one panel of 64 weight rows for each of two or three consumers, two panels for each of two, or with more
    than 192 rows three for two, which share one by its columns. block_k is 64, a line of 128 bytes; nothing is
    dequantised, so there is one part.
    """

    parts: Annotated[int, Field(ge=1, le=1)] = 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply, as far as that does not hang on the block."""
        return self.consumers_of(0)

    def consumers_of(self, block_m: int) -> int:
        """Warpgroups that multiply a block of so many rows: three have room for the sums of 192 by 192."""
        return 3 if self.block_n == 192 and block_m <= 192 else 2

    def __post_init__(self) -> None:
        if self.block_n not in (128, 192, 256) or (self.block_k, self.num_warps, self.parts) != (64, 4, 1):
            raise ConfigError(
                f"tile {self.key}: of a persistent tile of dense weights block_n is 128, 192 or 256, block_k 64,"
                " num_warps 4 and parts 1"
            )
        if self.head and not _part(self.head):
            raise ConfigError(f"head is {self.head}; a persistent tile's is a power of two, at least 8, or 0")


def _part(rows: int) -> bool:
    """Whether a block of a persistent tile can have a part of so many rows."""
    return rows >= 8 and rows.bit_count() == 1


@dataclass(frozen=True)
class Sm90BlockTile(GemmTile):
    """A tile of the Hopper kernels of block FP8 weights, with specialised warps, one program per multiprocessor.

    block_n is one or two blocks of 128 weight rows, in gate_up one of gate rows and their up rows; block_k is 128;
    num_warps counts one consumer's (4); num_stages counts K steps in the ring.
    """

    @property
    def blocks(self) -> int:
        """Blocks of 128 weight rows."""
        return self.block_n // 128

    def __post_init__(self) -> None:
        if (self.block_n, self.block_k, self.num_warps) not in ((128, 128, 4), (256, 128, 4)):
            raise ConfigError(
                f"tile {self.key}: with block FP8 weights on Hopper block_n is 128 or 256, block_k 128 and num_warps 4"
            )


@dataclass(frozen=True)
class Sm90RowsTile(GemmTile):
    """A tile of the Hopper kernels of many FP8 rows, 128 of them, and weights with one scale a row.

    Rows are on wgmma's M side. As `Sm90BlockTile` with two consumers; block_n is 256, block_k 128.
    """

    for_both: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.block_n, self.block_k, self.num_warps) != (256, 128, 4):
            raise ConfigError(
                f"tile {self.key}: with many FP8 rows on Hopper block_n is 256, block_k 128 and num_warps 4"
            )


@dataclass(frozen=True)
class LibraryTile(GemmTile):
    """No tile of ours: the matrices go to a library, which cuts them as it likes."""

    block_n: int = 0
    block_k: int = 0
    group_m: int = 0
    num_warps: int = 0
    num_stages: int = 0

    @property
    def key(self) -> str:
        """``library``."""
        return "library"


@dataclass(frozen=True)
class LayerTiles:
    """Tiles of one layer call.

    Args:
        block_m: rows of a block, a power of two, at least 16; with Hopper tiles that are not persistent at least 8.
            With persistent tiles also the sum of two powers of two, each at least 8. With a library's: experts are
            taken together until they have so many rows.
        gate_up: tile of the first GEMM.
        down: tile of the second GEMM; the same one where it is for both.
    """

    block_m: int
    gate_up: GemmTile
    down: GemmTile

    def __post_init__(self) -> None:
        hopper = (Sm90Tile, Sm90PersistentTile)
        both = (self.gate_up, self.down)
        least = 8 if all(isinstance(tile, hopper) for tile in both) else 16
        if any(tile.for_both for tile in both) and self.gate_up != self.down:
            raise ConfigError(f"tiles {self.key}: such a tile must be both stages'")
        if isinstance(self.gate_up, Sm90PersistentTile):
            if not self.gate_up.cuts(self.block_m):
                head = f"{self.gate_up.head} and one more" if self.gate_up.head else "at most two powers of two"
                raise ConfigError(
                    f"block_m is {self.block_m}; it must be the sum of {head}, none below 8, or one alone, at least 16"
                )
            dense = isinstance(self.gate_up, Sm90DenseTile)
            if self.gate_up.consumers > 2 and self.block_m >= 256 and not dense:
                raise ConfigError(f"block_m is {self.block_m}; with three consumers it must be below 256")
            return
        if self.block_m < least or self.block_m.bit_count() > 1:
            raise ConfigError(f"block_m is {self.block_m}; it must be a power of two, none below {least}")
        if isinstance(self.gate_up, LibraryTile) and isinstance(self.down, LibraryTile):
            return
        if isinstance(self.gate_up, Sm90BlockTile) and self.gate_up.blocks != 2:
            raise ConfigError(
                f"gate_up.block_n is {self.gate_up.block_n}; with block FP8 weights on Hopper it must be 256, for 128"
                " gate rows and their up rows"
            )
        for name in ("gate_up", "down"):
            tile: GemmTile = getattr(self, name)
            for size in ("block_n", "block_k"):
                value = getattr(tile, size)
                if value < 16 or value & (value - 1):
                    raise ConfigError(f"{name}.{size} is {value}; it must be a power of two, at least 16")

    @classmethod
    def both(cls, block_m: int, tile: GemmTile) -> LayerTiles:
        """One tile for both GEMMs."""
        return cls(block_m, tile, tile)

    @property
    def packed(self) -> bool:
        """Whether the routed rows are gathered or quantised first, and both GEMMs run on packed rows."""
        return isinstance(self.gate_up, (Sm90PersistentTile, Sm90BlockTile, Sm90RowsTile))

    @property
    def key(self) -> str:
        """The tiles in one word: ``block_m/gate_up/down``."""
        return f"{self.block_m}/{self.gate_up.key}/{self.down.key}"

    def arrivals(self, hidden: int, intermediate: int) -> int:
        """Counters that the kernels need for each row block.

        One for each tile whose reduction is shared. Two where the rows lie packed: one launch for both GEMMs needs one
        for itself and one for each block, and two launches need one each.
        """
        if self.packed:
            return 2
        outputs = ((self.gate_up, 2 * intermediate), (self.down, hidden))
        return sum(
            -(-(-(-rows // 64) * 64) // tile.block_n)
            for tile, rows in outputs
            if isinstance(tile, Sm90Tile) and tile.shares > 1
        )


@dataclass(frozen=True)
class TileRange:
    """Tiles for calls whose expected rows per expert do not exceed ``max_rows``."""

    max_rows: float
    tiles: LayerTiles


def has_few_tiles(shape: LayerShape) -> bool:
    """Whether one block of rows for each local expert is too few tiles of down for the GPU, and reductions are long.

    Mixtral's layers are that on eight ranks and on four, with one wide expert or two.
    """
    is_long = min(shape.hidden, shape.intermediate) >= LONG_K
    has_few = shape.local_experts * shape.hidden <= FEW_OUTPUTS
    return is_long and has_few and not is_mostly_remote(shape)


def is_mostly_remote(shape: LayerShape) -> bool:
    """Whether nearly all of a call's routes are other ranks': nearly all programs of a launch have no tile."""
    return shape.experts > MOST_REMOTE * shape.local_experts


def rows_per_expert(tokens: int, shape: LayerShape) -> float:
    """Rows that one expert gets when the router is balanced: T*K/E."""
    return tokens * shape.top_k / shape.experts


ANY = float("inf")
"""A range without an end."""
