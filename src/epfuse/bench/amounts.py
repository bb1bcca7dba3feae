"""What a record's numbers and names may be, checked where one is read from a file (`epfuse.bench.read_record`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=1000)]
"""A name that a terminal shows: without control characters."""
Size = Annotated[int, Field(ge=1, le=1 << 40)]
Amount = Annotated[float, Field(ge=0, le=1e30)]
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]  # ratios of two stay finite
