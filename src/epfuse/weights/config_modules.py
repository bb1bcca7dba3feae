"""Which layers' experts a list of module names in a quantisation config means: names, globs and simple regexes.

Regexes of a file are never run, they could take for ever: the simple ones are made globs, others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from itertools import product

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
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"))
"""The names that an expert's matrices have, and in the last row the names of all experts together."""
MATRICES = (
    *(tuple(f".{expert}.{name}" for expert in (0, 1) for name in names) for names in PROJECTIONS[:2]),
    tuple(f".{name}" for name in PROJECTIONS[2]),
)
"""What stands behind the experts' name, in checkpoints of each kind; two experts stand for all."""


class ExpertModules:
    """The names of the experts' modules in the layers that have experts.

    Args:
        layers: their indices.
        module: the experts' name within a layer.
    """

    def __init__(self, layers: tuple[int, ...], module: str) -> None:
        self.layers = layers
        self.module = module
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
            ConfigError: a pattern names a part of a layer's experts, is a regex that is not read, or there are too
                many.
        """
        found: set[int] = set()
        globs: dict[str, str] = {}
        for pattern in dict.fromkeys(patterns):
            if re.fullmatch(r"[\w.-]*", pattern):
                found.update(self._plain(config, key, pattern))
                continue
            globs |= dict.fromkeys(_globs(config, key, pattern), pattern)
            if self._patterns + len(globs) > MOST_PATTERNS:
                raise config.refuse(f"{key} has too many patterns; at most {MOST_PATTERNS} of a model are read")
        self._patterns += len(globs)
        matches = [(re.compile(translate(glob)), pattern) for glob, pattern in globs.items()]
        return frozenset(found.union(layer for layer in self.layers if self._is_named(config, key, layer, matches)))

    def _plain(self, config: Fields, key: str, name: str) -> tuple[int, ...]:
        parts = name.strip(".").split(".")
        within = parts
        layers = self.layers
        if "layers" in parts[:-1]:
            at = parts.index("layers")
            index = parts[at + 1]
            if not index.isascii() or not index.isdigit() or len(index) > 6:
                return ()
            if int(index) not in self._indices:
                return ()
            layers = (int(index),)
            within = parts[at + 2 :]
            if within and within[: len(self._parts)] != self._parts[: len(within)]:
                return ()
            inside = within[len(self._parts) :]
        elif len(parts) == 1 and parts[0] in ("model", "language_model"):
            return layers
        else:
            starts = [
                i for i in range(len(self._parts)) if self._parts[i : i + len(parts)] == parts[: len(self._parts) - i]
            ]
            if not starts:
                return ()
            inside = parts[len(self._parts) - starts[0] :]
        if inside and layers and _is_matrix(inside):
            raise config.refuse(f"{key} has {name!r:.80}: a part of a layer's experts is in another format")
        return () if inside else layers

    def _is_named(self, config: Fields, key: str, layer: int, matches: list[tuple[re.Pattern[str], str]]) -> bool:
        """Whether all experts of a layer are named by some of the globs; an error if only a part is."""
        part: str | None = None
        for head in HEADS:
            module = f"{head}layers.{layer}.{self.module}"
            if any(glob.match(module) for glob, _ in matches):
                return True
            for group in MATRICES:
                by = [next((pattern for glob, pattern in matches if glob.match(module + end)), None) for end in group]
                if None not in by:
                    return True
                part = next((pattern for pattern in by if pattern is not None), part)
        if part is not None:
            raise config.refuse(f"{key} has {part!r:.80}: a part of a layer's experts is in another format")
        return False


def _is_matrix(parts: list[str]) -> bool:
    """Whether a name within the experts is one of their matrices, or one of the experts."""
    names = {name for group in PROJECTIONS for name in group}
    return parts[0].isdigit() or parts[0] in names


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
