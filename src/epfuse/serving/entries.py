"""What may stand in a matrix: words and rules of InferenceX' fixed-seq-len configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StringConstraints, model_validator

from epfuse.serving.point import Count, Frozen, Name, Operand, Text

SpecDecoding = Literal["mtp", "draft_model", "none"]
EntryKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""No ``*`` and no ``?``: those select keys."""


class Kebab(Frozen):
    """A mapping of YAML, whose keys have hyphens."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"), validate_by_name=False
    )


def _listed(found: object) -> object:
    """One concurrency is a list of one."""
    return [found] if type(found) is int else found


class _Concurrencies(Kebab):
    """Either both ends of a range or a list."""

    conc_start: Count | None = None
    conc_end: Count | None = None
    conc_list: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000), BeforeValidator(_listed)] | None = (
        None
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> _Concurrencies:
        start, end = self.conc_start, self.conc_end
        if (start is None) != (end is None):
            raise ValueError("conc-start and conc-end come together")
        if (start is None) == (self.conc_list is None):
            raise ValueError("it needs either conc-start and conc-end or conc-list, and not both")
        if start is not None and end is not None and start > end:
            raise ValueError(f"conc-start is {start}; it must be at most conc-end, {end}")
        return self

    def concurrencies(self, step: int) -> list[int]:
        """The list, or the range: start times ``step`` as often as it fits, and the end in any case."""
        if self.conc_list is not None:
            return list(self.conc_list)
        assert self.conc_start is not None
        assert self.conc_end is not None
        found = []
        value = self.conc_start
        while value < self.conc_end:
            found.append(value)
            value *= step
        return [*found, self.conc_end]


class Search(_Concurrencies):
    """Points of one node: a layout of ranks, and concurrencies."""

    tp: Count
    ep: Count | None = None
    dp_attn: StrictBool | None = None
    spec_decoding: SpecDecoding = "none"


class Worker(Kebab):
    """Prefill or decode workers of several nodes."""

    num_worker: Count
    tp: Count
    ep: Count
    dp_attn: StrictBool
    additional_settings: tuple[Text, ...] = ()


class MultiNodeSearch(_Concurrencies):
    """Points of several nodes."""

    spec_decoding: SpecDecoding = "none"
    prefill: Worker
    decode: Worker


class Lengths(Kebab):
    """Sequence lengths and what is searched at them, on one node."""

    isl: Count
    osl: Count
    search_space: Annotated[tuple[Search, ...], Field(min_length=1, max_length=1000)]


class MultiNodeLengths(Kebab):
    """The same on several nodes."""

    isl: Count
    osl: Count
    search_space: Annotated[tuple[MultiNodeSearch, ...], Field(min_length=1, max_length=1000)]


class _Entry(Kebab):
    image: Operand
    model: Operand
    model_prefix: Name
    precision: Name
    framework: Name
    runner: Name


class Entry(_Entry):
    """A model on a kind of node; prefill and decode run in the same server."""

    multinode: Literal[False] = False
    disagg: Literal[False] = False
    seq_len_configs: Annotated[tuple[Lengths, ...], Field(min_length=1, max_length=1000)]


class MultiNodeEntry(_Entry):
    """A model on several nodes."""

    multinode: Literal[True]
    disagg: StrictBool = False
    seq_len_configs: Annotated[tuple[MultiNodeLengths, ...], Field(min_length=1, max_length=1000)]


AnyEntry = Entry | MultiNodeEntry
Runners = dict[Name, Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]]
"""Kind of node -> the nodes."""


def entry_kind(found: object) -> str:
    """Which of the two an entry says that it is: ``multinode`` decides, and its keys must fit."""
    if isinstance(found, MultiNodeEntry):
        return "multi"
    return "multi" if isinstance(found, Mapping) and found.get("multinode") is True else "single"
