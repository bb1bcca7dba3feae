"""The form of ``tables/<target>/<stage>.json``, checked whenever one is read."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from epfuse.config import LayerShape, Path, WeightFormat
from epfuse.families.family import Stage
from epfuse.stages.tiles import GemmTile, LayerTiles, Sm90BlockTile, Sm90PersistentTile, Sm90Tile
from epfuse.target import Target

LARGEST = 1 << 24
"""No size in a table is as large."""


class _TableEntry(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PortableEntry(_TableEntry):
    """A `GemmTile`."""

    kind: Literal["portable"] = "portable"
    block_n: Annotated[int, Field(ge=16, le=LARGEST)]
    block_k: Annotated[int, Field(ge=16, le=LARGEST)]
    group_m: Annotated[int, Field(ge=0, le=LARGEST)]
    num_warps: Annotated[int, Field(ge=1, le=LARGEST)]
    num_stages: Annotated[int, Field(ge=1, le=LARGEST)]

    def tile(self) -> GemmTile:
        """As the launchers take it."""
        return GemmTile(**self.model_dump(exclude={"kind"}))


class Sm90Entry(PortableEntry):
    """A `Sm90Tile`."""

    kind: Literal["sm90"] = "sm90"  # type: ignore[assignment]
    split_k: Annotated[int, Field(ge=1, le=LARGEST)] = 1
    guess_bytes: Annotated[int, Field(ge=0, le=LARGEST, multiple_of=16)] = 0

    def tile(self) -> GemmTile:
        return Sm90Tile(**self.model_dump(exclude={"kind"}))


class Sm90PersistentEntry(PortableEntry):
    """A `Sm90PersistentTile`."""

    kind: Literal["sm90_persistent"] = "sm90_persistent"  # type: ignore[assignment]
    parts: Annotated[int, Field(ge=1, le=LARGEST)] = 2
    head: Annotated[int, Field(ge=0, le=LARGEST)] = 0

    def tile(self) -> GemmTile:
        return Sm90PersistentTile(**self.model_dump(exclude={"kind"}))


class Sm90BlockEntry(PortableEntry):
    """A `Sm90BlockTile`."""

    kind: Literal["sm90_block"] = "sm90_block"  # type: ignore[assignment]

    def tile(self) -> GemmTile:
        return Sm90BlockTile(**self.model_dump(exclude={"kind"}))


TileEntry = Annotated[PortableEntry | Sm90Entry | Sm90PersistentEntry | Sm90BlockEntry, Field(discriminator="kind")]


def entry_of(tile: GemmTile) -> PortableEntry:
    """A tile as it stands in a table."""
    if isinstance(tile, Sm90Tile):
        return Sm90Entry(**asdict(tile))
    if isinstance(tile, Sm90PersistentTile):
        return Sm90PersistentEntry(**asdict(tile))
    if isinstance(tile, Sm90BlockTile):
        return Sm90BlockEntry(**asdict(tile))
    return PortableEntry(**asdict(tile))


class ShapeEntry(_TableEntry):
    """A `LayerShape`."""

    hidden: int
    intermediate: int
    experts: int
    local_experts: int
    top_k: int

    @model_validator(mode="after")
    def _check(self) -> ShapeEntry:
        self.shape()
        return self

    @classmethod
    def of(cls, shape: LayerShape) -> ShapeEntry:
        """``shape`` as it stands in a table."""
        return cls(**asdict(shape))

    def shape(self) -> LayerShape:
        """As the policy takes it."""
        return LayerShape(**self.model_dump())


class TileRow(_TableEntry):
    """The best tile of one stage at one token count with one block_m.

    Attributes:
        tokens: T.
        block_m: rows of a block; both stages of a call share it.
        tile: the tile.
        microseconds: of the stage alone, median.
        roofline: the least time that the device's rates allow, over ``microseconds``.
        layer_microseconds: of a whole call in this tile and the other stage's best one with the same block_m; None if
            only the stages were timed.
    """

    tokens: Annotated[int, Field(ge=1, le=LARGEST)]
    block_m: Annotated[int, Field(ge=8, le=LARGEST)]
    tile: TileEntry
    microseconds: Annotated[float, Field(gt=0)]
    roofline: Annotated[float, Field(gt=0)]
    layer_microseconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> TileRow:
        tile = self.tile.tile()
        LayerTiles(self.block_m, tile, tile)  # here, where the file is known, not in the first call that takes it
        return self


BEFORE = "; before: "
"""Between the commands of a measurement's rows, the newest first."""


class Measurement(_TableEntry):
    """Rows that were measured on one device for one layer.

    Attributes:
        device: the product, as torch names it.
        path: neither AUTO nor REFERENCE.
        weights: the format that the kernels read.
        shape: H, I, E, L, K of one rank.
        torch, triton: versions.
        date: of the newest rows.
        source: the command that measured; behind BEFORE the commands of older rows, if there are any.
        rows: ascending in tokens, then block_m.
    """

    device: Annotated[str, Field(min_length=1)]
    path: Path
    weights: WeightFormat
    shape: ShapeEntry
    torch: str
    triton: str
    date: datetime.date
    source: Annotated[str, Field(min_length=1)]
    rows: tuple[TileRow, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What two measurements of a table differ in."""
        return self.device, self.path, self.weights, self.shape

    @model_validator(mode="after")
    def _check(self) -> Measurement:
        if self.path in (Path.AUTO, Path.REFERENCE):
            raise ValueError(f"path is {self.path.value!r}, which has no tiles")
        order = [(row.tokens, row.block_m) for row in self.rows]
        if order != sorted(set(order)):
            raise ValueError("rows must ascend in tokens, then block_m, each pair once")
        return self


class TileTable(_TableEntry):
    """One file: all measurements of one stage on one target."""

    version: Literal[1] = 1
    target: Target
    stage: Stage
    measurements: tuple[Measurement, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> TileTable:
        keys = [measurement.key for measurement in self.measurements]
        if len(set(keys)) != len(keys):
            raise ValueError("two measurements have one device, path, weights and shape; they must be one")
        return self

    def merged(self, new: Measurement) -> TileTable:
        """With ``new``; where it has a row for a token count, the old rows for that count go.

        The rest of an older measurement of the same layer is kept only if it was made with the same versions.
        """
        kept: list[TileRow] = []
        counts = {row.tokens for row in new.rows}
        commands = [new.source]
        others = []
        for measurement in self.measurements:
            if measurement.key != new.key:
                others.append(measurement)
            elif (measurement.torch, measurement.triton) == (new.torch, new.triton):
                kept = [row for row in measurement.rows if row.tokens not in counts]
                if kept:
                    commands += measurement.source.split(BEFORE)
        rows = sorted([*kept, *new.rows], key=lambda row: (row.tokens, row.block_m))
        update = {"rows": tuple(rows), "source": BEFORE.join(dict.fromkeys(commands))}
        return self.model_copy(update={"measurements": (*others, new.model_copy(update=update))})
