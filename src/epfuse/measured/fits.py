"""The numbers of the time model of tiles, ``tables/<target>/times.json``: fitted to the rows beside it."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epfuse.arguments import checks_enums
from epfuse.config import Path, WeightFormat
from epfuse.errors import ConfigError, first_fault
from epfuse.hardware.tile_time import TileTimes
from epfuse.input_file import read_file
from epfuse.measured import store
from epfuse.target import Target

LARGEST_FILE = 1 << 20
"""Bytes."""

Number = Annotated[float, Field(gt=0, lt=1e6)]


class FitEntry(BaseModel):
    """What was fitted to one product's rows of one path.

    Attributes:
        device: the product, as torch names it.
        path, weights: of the kernels.
        source: the rows, and the command that fitted.
        points: calls that were fitted.
        error: relative error of the calls' times, root mean square.
        error_other_shape: the same of a layer's rows when none of that layer's were fitted.
        numbers: of `TileTimes`, all but the device.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: Annotated[str, Field(min_length=1)]
    path: Path
    weights: WeightFormat
    source: Annotated[str, Field(min_length=1)]
    points: Annotated[int, Field(ge=1)]
    error: Annotated[float, Field(gt=0, lt=1)]
    error_other_shape: Annotated[float, Field(gt=0, lt=1)]
    units: Annotated[int, Field(ge=1, le=1024)]
    numbers: dict[str, Number | tuple[Number, Number, Number]]

    def times(self) -> TileTimes:
        """As the model takes them."""
        return TileTimes(device=self.device, units=self.units, **self.numbers)  # type: ignore[arg-type]


class FitFile(BaseModel):
    """One file: the fits of one target."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    target: Target
    fits: tuple[FitEntry, ...] = ()


@checks_enums
def fit_path(folder: pathlib.Path, target: Target) -> pathlib.Path:
    """Where a target's file lies in a folder of tables."""
    return folder / target.value / "times.json"


@checks_enums
def fit_of(target: Target, device_name: str, path: Path, weights: WeightFormat) -> FitEntry | None:
    """What was fitted to a product's rows; None if nothing was.

    Raises:
        ConfigError: the file is damaged.
    """
    fits = _read(fit_path(store.TABLES, target)).fits
    return next((fit for fit in fits if (fit.device, fit.path, fit.weights) == (device_name, path, weights)), None)


@functools.cache
def _read(path: pathlib.Path) -> FitFile:
    if not os.path.lexists(path):
        return FitFile(target=Target(path.parent.name))
    try:
        found = FitFile.model_validate_json(read_file(path, "fitted times", LARGEST_FILE))
        for fit in found.fits:
            fit.times()
    except ValidationError as error:
        place, fault = first_fault(error, "the top")
        raise ConfigError(f"fitted times {path} are wrong at {place}: {fault}") from None
    except TypeError as error:
        raise ConfigError(f"fitted times {path} have other numbers than the model: {error}") from None
    return found
