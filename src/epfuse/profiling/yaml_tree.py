"""YAML from strangers: its size once aliases are written out is bounded, and every value knows its line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from epfuse.profiling.text import printable

MOST_VALUES = 20_000
"""Values in a file with every alias and merge written out: ten lines can stand for more than any memory holds."""
LONGEST_NUMBER = 40
"""Digits; a number to base 60, which YAML has too, takes time that grows with their square."""


class YamlFault(ValueError):
    """The text is no YAML that can be used; the message says where."""


class YamlTree:
    """A document's values, and where each of them stands.

    Attributes:
        values: plain Python.
    """

    def __init__(self, text: str, most_values: int = MOST_VALUES) -> None:
        """Parse a document.

        Args:
            text: of the file.
            most_values: that it may have with every alias written out.

        Raises:
            YamlFault: it is not YAML, too large once its aliases are written out, contains itself, or has a key twice.
        """
        try:
            loader = _Loader(text, most_values)
            self._root = loader.get_single_node()
            self.values: Any = None if self._root is None else loader.construct_document(self._root)
        except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError) as error:
            # TypeError: a mapping's key that is a list
            raise YamlFault(printable(" ".join(str(error).split()))[:500]) from None

    def line(self, path: Sequence[str | int]) -> int:
        """The line, from 1, of a value or of the nearest one around it that the file has; merged ones have none."""
        node, _ = self._nearest(path)
        return 1 if node is None else int(node.start_mark.line) + 1

    def written(self, path: Sequence[str | int]) -> str | None:
        """A scalar as the file has it: ``1.10``, not 1.1; None where it has none, as of merged ones."""
        node, whole = self._nearest(path)
        return str(node.value) if whole and isinstance(node, yaml.ScalarNode) else None

    def _nearest(self, path: Sequence[str | int]) -> tuple[Any, bool]:
        """The node of a value, or the nearest one around it, and which of the two it is."""
        node = self._root
        for step in path:
            below = None
            if isinstance(node, yaml.MappingNode):
                below = next((value for key, value in node.value if key.value == step), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                below = node.value[step]
            if below is None:
                return node, False
            node = below
        return node, True


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    def __init__(self, text: str, most_values: int) -> None:
        super().__init__(text)
        self._most_values = most_values
        self._sizes: dict[int, int] = {}  # of the nodes that are complete, by identity
        self._composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias is not None:
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "a value contains itself", alias.start_mark)
            return node
        self._composed += 1
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(self._sizes[id(key)] + self._sizes[id(value)] for key, value in node.value)
            self._refuse_keys_twice(node)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._sizes[id(item)] for item in node.value)
        elif node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > LONGEST_NUMBER:
            raise yaml.composer.ComposerError(
                None, None, f"a number has more than {LONGEST_NUMBER} digits", node.start_mark
            )
        if max(size, self._composed) > self._most_values:
            raise yaml.composer.ComposerError(
                None, None, f"with its aliases it has more than {self._most_values} values", node.start_mark
            )
        self._sizes[id(node)] = size
        return node

    def _refuse_keys_twice(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value[:80]!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
