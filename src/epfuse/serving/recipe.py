"""Recipes: YAML that says what is served, on what, with which arms, and when an answer is good enough to be timed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from epfuse.errors import ConfigError, MissingDependency
from epfuse.input_file import read_file
from epfuse.profiling.cpu_budget import CpuBudget
from epfuse.profiling.text import printable

try:
    from pydantic import (
        AfterValidator,
        BeforeValidator,
        Discriminator,
        Field,
        FiniteFloat,
        Tag,
        ValidationError,
        model_validator,
    )

    from epfuse.profiling.yaml_tree import MOST_VALUES, YamlFault, YamlTree
except ImportError as _missing:
    raise MissingDependency(f"recipes need the package {_missing.name!r}: pip install 'epfuse[serve]'") from _missing

from epfuse.serving.entries import Entry, EntryKey, MultiNodeEntry, Runners, entry_kind
from epfuse.serving.point import (
    AccuracyGate,
    Compare,
    Count,
    Deadlines,
    EnvName,
    Frozen,
    Image,
    Name,
    Operand,
    Polls,
    PutIn,
    Slurm,
    Text,
    Venv,
)

LARGEST_FILE = 1 << 20
"""Bytes of a recipe."""
READING_SECONDS = 10.0
"""CPU time in which a recipe must be read."""
ONE_NODE, SEVERAL_NODES = "one-node", "several-nodes"
FOLDER = "recipes"
SIX = (1, 16, 256)
"""Concurrencies of the matrix that InferenceX pull request 1782 could not run."""

FATAL = (
    r"torch\.OutOfMemoryError|(CUDA|HIP) out of memory",
    r"Memory access fault by GPU|CUDA error: |HIP error: ",
    r"EngineCore (encountered a fatal error|failed to start)|EngineDeadError|WorkerProc hit an exception",
)
"""Lines of a server's log after which it will not answer any more, though its process may live on."""


def _word(value: object) -> object:
    """A number in a list of arguments is a word."""
    return str(value) if type(value) in (int, float) else value


def _pattern(text: str) -> str:
    """A regular expression that compiles: on the node it would be too late."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return text


Word = Annotated[Text, BeforeValidator(_word)]
AnyWord = Annotated[str, BeforeValidator(_word)]
Words = Annotated[tuple[Word, ...], Field(max_length=1000)]
EnvSettings = dict[EnvName, AnyWord]
Environment = Annotated[Venv | Image, Field(discriminator="kind")]
MatrixEntry = Annotated[
    Annotated[Entry, Tag(ONE_NODE)] | Annotated[MultiNodeEntry, Tag(SEVERAL_NODES)],
    Discriminator(lambda found: ONE_NODE if entry_kind(found) == "single" else SEVERAL_NODES),
]


class ServerSettings(Frozen):
    """What the servers of all arms have in common.

    Attributes:
        arguments: after those that the point gives ``vllm serve``.
        command: another server: all of its words. ``{model} {port} {tp} {ep} {concurrency} {max_model_len}`` stand for
            the point's; what it needs beyond that is in its environment (`epfuse.serving.plan.point_environment`).
        plugins: of vLLM's plugins the ones that every arm loads; epfuse is none of them.
    """

    arguments: Words = ()
    command: Words | None = None
    env: EnvSettings = Field(default={})
    plugins: tuple[Text, ...] = ()


class ArmSettings(Frozen):
    """What an arm has of its own; words and variables are added to the common ones."""

    name: Name
    arguments: Words = ()
    command: Words | None = None
    env: EnvSettings = Field(default={})
    environment: Environment | None = None
    epfuse: PutIn = PutIn.NOT
    epfuse_source: Text | None = None


class ClientSettings(Frozen):
    """The load, by the point's concurrency; `epfuse.serving.point.Client` has the meanings."""

    tool: Literal["vllm", "guidellm", "builtin"] = "vllm"
    command: tuple[Word, ...] | None = None
    prompts_per_concurrency: Count = 10
    least_prompts: Count = 1
    warmups_per_concurrency: Annotated[int, Field(strict=True, ge=0, le=1000)] = 2
    shortest_share: Annotated[FiniteFloat, Field(strict=True, gt=0, le=1)] = 0.8
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    most_failed: Annotated[FiniteFloat, Field(strict=True, ge=0, lt=1)] = 0.05


class Recipe(Frozen):
    """A recipe's file.

    Attributes:
        about: what it is and where it comes from.
        label: words that every output shows.
        matrix: key -> model, hardware, lengths, layouts of ranks and concurrencies, as InferenceX writes them.
        runners: kind of node -> the nodes.
        six: concurrencies that ``--six`` leaves.
        model: what the server is given in place of a matrix entry's model: a folder on the node.
        gpu_vendor: what samples the GPUs and lets a container see them.
        environment: where servers run; an entry's image is the reference of an image that names none.
        arms: the first one is the baseline.
    """

    version: Literal[1] = Field(alias="schema")
    name: Name
    about: str = ""
    label: Annotated[str, Field(max_length=400)] = ""
    matrix: Annotated[dict[EntryKey, MatrixEntry], Field(min_length=1, max_length=1000)]
    runners: Runners = Field(default={})
    six: Annotated[tuple[Count, ...], Field(min_length=1, max_length=100)] = SIX
    model: Operand | None = None
    gpu_vendor: Literal["amd", "nvidia", "none"]
    environment: Environment = Venv()
    server: ServerSettings = ServerSettings()
    arms: Annotated[tuple[ArmSettings, ...], Field(min_length=1, max_length=8)]
    client: ClientSettings = ClientSettings()
    gate: AccuracyGate = AccuracyGate()
    deadlines: Deadlines = Deadlines()
    polls: Polls = Polls()
    host: Text = "127.0.0.1"
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 8888
    fatal: tuple[Annotated[Text, AfterValidator(_pattern)], ...] = FATAL
    needs: tuple[Text, ...] = ()
    compare: Compare = Compare()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError("two arms have the same name")
        if len(names) > 1 and not {self.compare.baseline, self.compare.candidate} <= set(names):
            raise ValueError(
                f"compare names {self.compare.baseline!r} and {self.compare.candidate!r}; arms are {names}"
            )
        if len(names) > 1 and names.index(self.compare.baseline) >= names.index(self.compare.candidate):
            raise ValueError(
                f"compare's baseline, {self.compare.baseline!r}, must stand before its candidate,"
                f" {self.compare.candidate!r}, in arms: the gate compares answers with those of the first arm"
            )
        unknown = sorted({entry.runner for entry in self.matrix.values()} - set(self.runners))
        if self.runners and unknown:
            raise ValueError(f"runner {unknown[0]!r} of the matrix is not in runners")
        return self


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and what identifies it."""

    recipe: Recipe
    source: str
    sha256: str


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with epfuse."""
    folder = resources.files("epfuse.serving") / FOLDER
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str) -> LoadedRecipe:
    """A recipe from a file, or a shipped one by its name.

    Raises:
        ConfigError: it is neither, or does not fit; the message names file, line and key.
    """
    shipped = source.removesuffix(".yaml")
    if "/" not in source and shipped in shipped_recipes() and not Path(source).is_file():
        data = (resources.files("epfuse.serving") / FOLDER / f"{shipped}.yaml").read_bytes()
    elif not Path(source).exists():
        names = ", ".join(shipped_recipes())
        raise ConfigError(f"recipe {printable(source)} is no file; shipped recipes are {names}")
    else:
        data = read_file(Path(source), "recipe", LARGEST_FILE)
    where = printable(source)
    with CpuBudget(READING_SECONDS).spend(lambda: f"reading recipe {where}"):
        recipe = parse(data, Recipe, "recipe", where)
    return LoadedRecipe(recipe, where, hashlib.sha256(data).hexdigest())


Model = TypeVar("Model", bound=Frozen)


def parse(data: bytes, kind: type[Model], what: str, where: str) -> Model:
    """A model from YAML.

    Args:
        data: the file's bytes.
        kind: the model's class.
        what: the file's content in words.
        where: the file's name.

    Raises:
        ConfigError: it is not UTF-8, no YAML or does not fit; the message has file, line and key.
    """
    tree = read_tree(data, what, where)
    try:
        return kind.model_validate(_words_as_written(tree))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = without_tags(first["loc"])
        place = ".".join(printable(str(step))[:80] for step in path) or "the file"
        message = "this key is unknown" if first["type"] == "extra_forbidden" else printable(first["msg"])
        raise ConfigError(f"{what} {where}, line {tree.line(path)}: {place}: {message}") from None


def _words_as_written(tree: YamlTree) -> Any:
    """The document; words and variables that YAML takes for numbers are as they stand: 1.10 is not 1.1, nor 010 8."""
    arms = tree.values.get("arms") if isinstance(tree.values, dict) else None
    places: list[tuple[str | int, ...]] = [("server",), ("client",)]
    places += [("arms", number) for number in range(len(arms))] if isinstance(arms, list) else []
    for place in places:
        settings: Any = tree.values
        for step in place:
            settings = (
                settings[step] if isinstance(step, int) or (isinstance(settings, dict) and step in settings) else None
            )
        for name in ("arguments", "command", "env") if isinstance(settings, dict) else ():
            words = settings.get(name)
            items = enumerate(words) if isinstance(words, list) else words.items() if isinstance(words, dict) else ()
            for key, value in list(items):
                if type(value) in (int, float):
                    words[key] = tree.written((*place, name, key)) or value
    return tree.values


def read_tree(data: bytes, what: str, where: str, most_values: int = MOST_VALUES) -> YamlTree:
    """YAML with lines, within limits of values, aliases and depth.

    Raises:
        ConfigError: it is not UTF-8 or no such YAML.
    """
    try:
        return YamlTree(data.decode("utf-8-sig"), most_values)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {where} is not UTF-8: {error}") from None
    except YamlFault as fault:
        raise ConfigError(f"{what} {where} is not YAML: {fault}") from None


def without_tags(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """Where the file has a fault: pydantic also names which of several classes an object was taken for."""
    found: list[str | int] = []
    for step in path:
        kind = bool(found) and found[-1] == "environment" and step in ("venv", "image")
        if step not in (ONE_NODE, SEVERAL_NODES) and not kind:
            found.append(step)
    return tuple(found)


def environment_of(recipe: Recipe, arm: ArmSettings, image: str) -> Venv | Image:
    """Where an arm's server runs; ``{image}`` in an image's reference stands for the matrix entry's."""
    chosen = recipe.environment if arm.environment is None else arm.environment
    if isinstance(chosen, Image):
        return chosen.model_copy(update={"reference": chosen.reference.replace("{image}", image)})
    return chosen


def joined(*parts: Mapping[str, str]) -> dict[str, str]:
    """Environment variables; later ones win."""
    return {name: value for part in parts for name, value in part.items()}
