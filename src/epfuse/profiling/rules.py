"""Rules that turn kernels into phases: YAML files, shipped for common backends and given by users."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from epfuse.errors import ConfigError, MissingDependency
from epfuse.input_file import read_file
from epfuse.profiling.cpu_budget import CpuBudget
from epfuse.profiling.phases import Phase
from epfuse.profiling.text import printable

try:
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

    from epfuse.profiling.yaml_tree import YamlFault, YamlTree
except ImportError as _missing:
    raise MissingDependency(
        f"'epfuse profile' needs the package {_missing.name!r}: pip install 'epfuse[profile]'"
    ) from _missing

LARGEST_FILE = 1 << 18
"""Bytes of a rules file."""
MOST_RULES = 500
"""In one file; each is tried on every kernel."""
LONGEST_PATTERN = 2000
"""Characters of a regular expression."""
READING_SECONDS = 10.0
"""CPU time in which a file must be read and its patterns compiled."""


def _pattern(value: Any) -> re.Pattern[str]:
    if not isinstance(value, str) or not value:
        raise ValueError("it must be a regular expression")
    if len(value) > LONGEST_PATTERN:
        raise ValueError(f"a regular expression may have {LONGEST_PATTERN} characters, and not {len(value)}")
    try:
        return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{value!r:.200} is no regular expression: {error}") from None


def _phases(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Pattern = Annotated[re.Pattern[str], BeforeValidator(_pattern)]
Phases = Annotated[frozenset[Phase], BeforeValidator(_phases)]


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Strict):
    """A phase, and what must be true of a kernel for it; every condition that is given must hold.

    Attributes:
        phase: the verdict.
        kernel: found in the kernel's name.
        range: found in the host ranges that enclose the launch, outermost first, joined by `` > ``.
        previous, next: found in the name of the nearest kernel of the same stream before or after it; ``glue``
            kernels are skipped.
        after, before: the nearest classified kernel of the same stream before or after it has one of these phases.
        layer_has, layer_lacks: a (no) kernel of the same layer has one of these phases.
        position: before the first layer, in a layer, or after the last one.
        weights: what the name tells of the expert weights' format in memory.
    """

    phase: Phase
    kernel: Pattern | None = None
    range: Pattern | None = None
    previous: Pattern | None = None
    next: Pattern | None = None
    after: Phases = frozenset()
    before: Phases = frozenset()
    layer_has: Phases = frozenset()
    layer_lacks: Phases = frozenset()
    position: Literal["head", "layer", "tail"] | None = None
    weights: Literal["bf16", "mxfp8", "mxfp4", "block_fp8"] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Rule:
        if self.kernel is None and self.range is None:
            raise ValueError("a rule needs 'kernel' or 'range'")
        return self

    @property
    def needs_phases(self) -> bool:
        """Whether other kernels' phases decide: such rules are tried after all others."""
        return bool(self.after or self.before or self.layer_has or self.layer_lacks or self.position)


class _RulesFile(_Strict):
    version: Literal[1] = Field(alias="schema")
    name: Annotated[str, AfterValidator(printable)]
    source: str = ""
    patterns: dict[str, Any] = {}  # a place for YAML anchors
    glue: Annotated[list[Pattern], Field(max_length=MOST_RULES)] = []
    rules: Annotated[list[Rule], Field(max_length=MOST_RULES)]


class RuleSet:
    """Rules in the order in which they are tried, with the name of the file that each comes from."""

    def __init__(self, files: Iterable[_RulesFile]) -> None:
        files = list(files)
        self.rules: list[Rule] = [rule for file in files for rule in file.rules]
        self.origins: list[str] = [file.name for file in files for _ in file.rules]
        self.glue: list[re.Pattern[str]] = [pattern for file in files for pattern in file.glue]
        self.where: dict[re.Pattern[str] | None, str] = {}
        """Pattern -> file and key, for messages; of a pattern that stands twice the first place."""
        for file in files:
            for number, pattern in enumerate(file.glue):
                self.where.setdefault(pattern, f"{file.name}: glue.{number}")
            for number, rule in enumerate(file.rules):
                for key in ("kernel", "range", "previous", "next"):
                    if (pattern := getattr(rule, key)) is not None:
                        self.where.setdefault(pattern, f"{file.name}: rules.{number}.{key}")

    @classmethod
    def load(cls, user_file: Path | None = None) -> RuleSet:
        """The rules of ``user_file``, which win, then the shipped rules.

        Raises:
            ConfigError: the file can't be read or does not fit the schema; the message names file and place.
        """
        files = []
        if user_file is not None:
            where = printable(str(user_file))
            text = _decoded(read_file(user_file, "rules", LARGEST_FILE), where)
            with CpuBudget(READING_SECONDS).spend(lambda: f"reading rules {where}"):
                files.append(_parse(text, where))
        return cls([*files, *_shipped()])


@functools.cache
def _shipped() -> tuple[_RulesFile, ...]:
    folder = resources.files("epfuse.profiling") / "rules"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(_parse(e.read_text(encoding="utf-8"), e.name) for e in entries if e.name.endswith(".yaml"))


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"rules {where} is not UTF-8: {error}") from None


def _parse(text: str, where: str) -> _RulesFile:
    try:
        tree = YamlTree(text)
    except YamlFault as fault:
        raise ConfigError(f"rules {where} is not YAML: {fault}") from None
    try:
        return _RulesFile.model_validate(tree.values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = first["loc"]
        place = ".".join(printable(str(step))[:80] for step in path) or "the file"
        raise ConfigError(f"rules {where}, line {tree.line(path)}: {place}: {printable(first['msg'])}") from None
