"""The form of ``tables/<target>/<stage>.json``, checked whenever one is read."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    model_validator,
)

from epfuse.config import Bias, LayerShape, Path, WeightFormat
from epfuse.families.family import Stage
from epfuse.stages.tiles import (
    LARGEST,
    GemmTile,
    LayerTiles,
    Sm90BlockTile,
    Sm90DenseTile,
    Sm90PersistentTile,
    Sm90RowsTile,
    Sm90Tile,
)
from epfuse.target import Target


class _TableEntry(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_NAMES: dict[object, str] = {
    GemmTile: "portable",
    Sm90Tile: "sm90",
    Sm90PersistentTile: "sm90_persistent",
    Sm90DenseTile: "sm90_dense",
    Sm90BlockTile: "sm90_block",
    Sm90RowsTile: "sm90_rows",
}


def _kind(value: object) -> object:
    return value.get("kind") if isinstance(value, dict) else _NAMES.get(type(value))


def _fields(value: object) -> object:
    return {key: one for key, one in value.items() if key != "kind"} if isinstance(value, dict) else value


TileEntry = Annotated[
    Annotated[GemmTile, BeforeValidator(_fields), Tag("portable")]
    | Annotated[Sm90Tile, BeforeValidator(_fields), Tag("sm90")]
    | Annotated[Sm90PersistentTile, BeforeValidator(_fields), Tag("sm90_persistent")]
    | Annotated[Sm90DenseTile, BeforeValidator(_fields), Tag("sm90_dense")]
    | Annotated[Sm90BlockTile, BeforeValidator(_fields), Tag("sm90_block")]
    | Annotated[Sm90RowsTile, BeforeValidator(_fields), Tag("sm90_rows")],
    Discriminator(_kind),
    PlainSerializer(lambda tile: {"kind": _NAMES[type(tile)], **asdict(tile)}),
]
"""A tile; in a file ``kind`` says which class's."""


class TileRow(_TableEntry):
    """The best tile of one stage at one token count with one block_m.

    Attributes:
        tokens: T.
        block_m: rows of a block; both stages of a call share it.
        tile: the tile.
        microseconds: of the stage alone, median; None if only whole calls were timed.
        roofline: the least time that the device's rates allow, over ``microseconds``; None with it.
        layer_microseconds: of a whole call in this tile and the other stage's best one with the same block_m; None if
            only the stages were timed.
    """

    tokens: Annotated[int, Field(ge=1, le=LARGEST)]
    block_m: Annotated[int, Field(ge=8, le=LARGEST)]
    tile: TileEntry
    microseconds: Annotated[float, Field(gt=0)] | None
    roofline: Annotated[float, Field(gt=0)] | None
    layer_microseconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> TileRow:
        # here, where the file is known, not in the first call that takes it
        LayerTiles(self.block_m, self.tile, self.tile)
        if (self.microseconds is None) != (self.roofline is None):
            raise ValueError("microseconds and roofline go together")
        if self.microseconds is None and self.layer_microseconds is None:
            raise ValueError("neither the stage nor a whole call was timed")
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
        bias: of both projections or none; none in tables that don't say.
        rows: ascending in tokens, then block_m.
    """

    device: Annotated[str, Field(min_length=1)]
    path: Path
    weights: WeightFormat
    shape: LayerShape
    torch: str
    triton: str
    date: datetime.date
    source: Annotated[str, Field(min_length=1)]
    bias: Bias = Bias.NONE
    rows: tuple[TileRow, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What two measurements of a table differ in."""
        return self.device, self.path, self.weights, self.shape, self.bias

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
            raise ValueError("two measurements have one device, path, weights, shape and biases; they must be one")
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
