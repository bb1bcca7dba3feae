"""Which layers' experts a list of module names in a quantisation config means: names, globs and simple regexes.

Regexes of a file are never run, they could take for ever: the simple ones are made globs, others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from itertools import product

from epfuse.errors import ConfigError
from epfuse.weights.config_fields import Fields

MOST_PATTERNS = 128
"""Globs and regexes of one model, whose alternatives count; plain names don't. Each is tried on every layer."""
MOST_ALTERNATIVES = 64
HEADS = (
    "model.",
    "language_model.model.",
    "model.language_model.",
    "thinker.model.",
    "model.decoder.",
    "backbone.",
    "",
)
"""What stands before ``layers`` where the language model is, in names of modules and of tensors; elsewhere are draft
models (``mtp.``)."""
MOST_NUMBERS = 8
"""Experts that globs and regexes of one list may name by their number."""
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names that the matrices of an expert with a gate have."""
UNGATED = (("up_proj", "down_proj"),)
"""The same of an expert without."""
STACKS = {True: ("gate_up_proj", "down_proj"), False: ("up_proj", "down_proj")}
"""Whether there is a gate -> the names of all experts' matrices together."""
NAMES = frozenset({name for names in (*GATED, *UNGATED, *STACKS.values()) for name in names})
EVERY = "*"
"""In place of an expert's number: each of them."""


class ExpertModules:
    """The names of the experts' modules in the layers that have experts.

    Args:
        layers: their indices.
        module: the experts' name within a layer.
        experts: E.
        gated: whether an expert has a gate.
    """

    def __init__(self, layers: tuple[int, ...], module: str, experts: int, gated: bool = True) -> None:
        self.layers = layers
        self.module = module
        self._experts = experts
        self._spellings = GATED if gated else UNGATED
        self._stacks = STACKS[gated]
        self._indices = frozenset(layers)
        self._patterns = 0
        self._parts = module.split(".")

    def named_by(self, config: Fields, key: str, patterns: list[str]) -> frozenset[int]:
        """The layers whose experts ``patterns`` name, all of a layer's or none.

        Args:
            config: where the list stands, for the errors.
            key: its name.
            patterns: plain names match a module, what is in it, and everywhere the end or a middle of a name; globs the
                whole name; regexes, after ``re:``, its beginning.

        Raises:
            ConfigError: the patterns name a part of a layer's experts, or one is a regex that is not read, or there are
                too many. Matrix by matrix they may name the experts if they name all.
        """
        found: set[int] = set()
        parts: dict[int, dict[tuple[str, ...], str]] = {}
        globs: dict[str, str] = {}
        for pattern in dict.fromkeys(patterns):
            if re.fullmatch(r"[\w.-]*", pattern):
                layers, inside = self._plain(pattern)
                if not inside:
                    found.update(layers)
                elif _is_matrix(inside):
                    for layer in layers:
                        parts.setdefault(layer, {})[inside] = pattern
                continue
            globs |= dict.fromkeys(_globs(config, key, pattern), pattern)
            if self._patterns + len(globs) > MOST_PATTERNS:
                raise config.refuse(f"{key} has too many patterns; at most {MOST_PATTERNS} of a model are read")
        self._patterns += len(globs)
        for layer, named in parts.items():
            if layer not in found and not self._is_whole(named):
                raise self._part(config, key, next(iter(named.values())))
        numbers = self._numbers(config, key, globs)
        matches = [(re.compile(translate(glob)), pattern) for glob, pattern in globs.items()]
        named_by_globs = (layer for layer in self.layers if self._is_named(config, key, layer, numbers, matches))
        return frozenset(found.union(parts, named_by_globs))

    def _part(self, config: Fields, key: str, pattern: str) -> ConfigError:
        return config.refuse(f"{key} has {pattern!r:.80}: a part of a layer's experts is in another format")

    def _is_whole(self, named: dict[tuple[str, ...], str]) -> bool:
        """Whether plain names within a layer's experts are all of them: every expert, or every matrix of each."""
        if all((name,) in named or (EVERY, name) in named for name in self._stacks):
            return True
        return any(
            all(
                (EVERY, name) in named or (str(expert),) in named or (str(expert), name) in named
                for expert in range(self._experts)
                for name in names
            )
            for names in self._spellings
        )

    def _numbers(self, config: Fields, key: str, globs: dict[str, str]) -> list[int]:
        """Experts that stand for all: what globs say of any number, and of those that they name, they say of these."""
        numbers = {0, self._experts - 1}
        for glob, pattern in globs.items():
            if re.search(rf"{re.escape(self._parts[-1])}.*\[(?!0-9\]\*)", glob):
                raise config.refuse(f"{key} has {pattern!r:.80}, which could name some of the experts' numbers")
            named = {int(number) for number in re.findall(r"(?<!layers)\.([0-9]{1,6})(?![0-9])", glob)}
            numbers |= {number for number in named if number < self._experts}
            if len(numbers) > MOST_NUMBERS:
                raise config.refuse(
                    f"{key} names experts by their numbers in patterns; at most {MOST_NUMBERS} are read"
                )
        return sorted(numbers)

    def _plain(self, name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The layers that a plain name is of, and what of their experts: a number, a matrix, or nothing for all."""
        parts = name.strip(".").split(".")
        within = parts
        layers = self.layers
        if "layers" in parts[:-1]:
            at = parts.index("layers")
            index = parts[at + 1]
            if not index.isascii() or not index.isdigit() or len(index) > 6:
                return (), ()
            if int(index) not in self._indices:
                return (), ()
            layers = (int(index),)
            within = parts[at + 2 :]
            if within and within[: len(self._parts)] != self._parts[: len(within)]:
                return (), ()
            inside = within[len(self._parts) :]
        elif len(parts) == 1 and parts[0] in ("model", "language_model"):
            return layers, ()
        elif len(parts) == 1 and parts[0] in NAMES:
            return layers, (EVERY, parts[0])
        else:
            starts = [
                i for i in range(len(self._parts)) if self._parts[i : i + len(parts)] == parts[: len(self._parts) - i]
            ]
            if not starts:
                return (), ()
            inside = parts[len(self._parts) - starts[0] :]
        return layers, tuple(inside[:-1] if inside[-1:] == ["weight"] else inside)

    def _is_named(
        self, config: Fields, key: str, layer: int, numbers: list[int], matches: list[tuple[re.Pattern[str], str]]
    ) -> bool:
        """Whether all experts of a layer are named by some of the globs; an error if only a part is."""
        part: str | None = None
        for head in HEADS:
            module = f"{head}layers.{layer}.{self.module}"
            if any(glob.match(module) for glob, _ in matches):
                return True
            stacks = [[f"{module}.{name}"] for name in self._stacks]
            experts = [
                [[f"{module}.{number}", f"{module}.{number}.{name}"] for number in numbers for name in names]
                for names in self._spellings
            ]
            for group in (stacks, *experts):
                by = [_first_of(matches, names) for names in group]
                if None not in by:
                    return True
                part = next((pattern for pattern in by if pattern is not None), part)
        if part is not None:
            raise self._part(config, key, part)
        return False


def _first_of(matches: list[tuple[re.Pattern[str], str]], names: list[str]) -> str | None:
    """The first pattern that matches any of the names."""
    return next((pattern for glob, pattern in matches if any(glob.match(name) for name in names)), None)


def _is_matrix(parts: tuple[str, ...]) -> bool:
    """Whether a name within the experts is one of their matrices, or one of the experts."""
    return parts[0].isdigit() or parts[0] in NAMES or parts[0] == EVERY


_ATOMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"\.[*+]\??", lambda text: "*" if "*" in text else "?*"),
    (r"\\d[*+]?|\[0-9\][*+]?", lambda text: "[0-9]*" if text[-1] in "*+" else "[0-9]"),
    (r"\\w[*+]", lambda text: "?*"),
    (r"\\[.\-_/]", lambda text: text[1]),
    (r"\.", lambda text: "?"),
    (r"[\w\-]+(?![*+?{])", lambda text: text),
)
"""Parts of a regex, and the glob that means the same in a module's name."""


def _globs(config: Fields, key: str, pattern: str) -> list[str]:
    """A pattern as globs, any of which may match."""
    if not pattern.startswith("re:"):
        if re.fullmatch(r"[\w.*?\[\]!-]+", pattern):
            return [pattern]
        text = pattern
    else:
        text = pattern[3:]
    refused = config.refuse(f"{key} has {pattern!r:.80}, a regex that is not read; it could name experts")
    if len(text) > 1000:
        raise refused
    choices: list[list[str]] = []
    ended = False
    text = text.removeprefix("^")
    while text:
        group = re.match(r"\((?:\?:)?([^()]*)\)(?![*+?{])", text)
        if text == "$":
            ended, text = True, ""
        elif group:
            choices.append(
                [part for choice in group[1].split("|") for part in [_translated(choice)] if part is not None]
            )
            if len(choices[-1]) != len(group[1].split("|")):
                raise refused
            text = text[group.end() :]
        else:
            plain = re.match(r"[^()$|^]+", text)
            made = None if plain is None else _translated(plain[0])
            if plain is None or made is None:
                raise refused
            choices.append([made])
            text = text[plain.end() :]
    count = 1
    for options in choices:
        count *= len(options)
        if count > MOST_ALTERNATIVES:
            raise refused
    return ["".join(parts) + ("" if ended else "*") for parts in product(*choices)]


def _translated(text: str) -> str | None:
    """A regex without groups as a glob; None for one that is not read."""
    made = ""
    while text:
        for atom, glob in _ATOMS:
            found = re.match(atom, text)
            if found:
                made += glob(found[0])
                text = text[found.end() :]
                break
        else:
            return None
    return made
