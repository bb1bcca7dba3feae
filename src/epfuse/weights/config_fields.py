"""Values of a config.json that nobody has checked yet, read by name and kept account of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from epfuse.errors import ConfigError

LARGEST_SIZE = 2**31 - 1
"""Sizes are 32-bit integers in the kernels."""


class Fields:
    """The fields of one object in a file.

    A family may write a size under several names; all that are there must agree. null is a field that is not there.

    Args:
        values: the object.
        place: the file and the object in it, for the errors.
    """

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.place = place
        self._values = values
        self._read: set[str] = set()

    def refuse(self, why: str) -> ConfigError:
        """The error that names this file; to be raised by the caller."""
        return ConfigError(f"{self.place}: {why}")

    def get(self, key: str) -> Any:
        """The value as it is; None if it is not there."""
        self._read.add(key)
        return self._values.get(key)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Fields that nobody asked for and that say something: neither null nor false, zero or empty."""
        return ((key, value) for key, value in self._values.items() if key not in self._read and value)

    def size(self, *keys: str, least: int = 1, most: int = LARGEST_SIZE, default: int | None = None) -> int:
        """An integer; a list with one number again and again, one a layer, counts as the number.

        Raises:
            ConfigError: it is not there and has no default, is no integer in the range, or the names contradict.
        """
        found: dict[str, int] = {}
        for key in keys:
            value = self.get(key)
            if isinstance(value, list) and value and all(type(v) is int and v == value[0] for v in value):
                value = value[0]
            if value is None:
                continue
            if type(value) is not int or not least <= value <= most:
                upper = "" if most == LARGEST_SIZE else f" and at most {most}"
                raise self.refuse(f"{key} is {_shown(value)}; it must be an integer, at least {least}{upper}")
            found[key] = value
        if len(set(found.values())) > 1:
            raise self.refuse(f"{_listed(found)} contradict each other; one size has one value")
        if found:
            return next(iter(found.values()))
        if default is None:
            raise self.refuse(f"none of {', '.join(keys)} is there")
        return default

    def number(self, key: str, default: float) -> float:
        """A finite number.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.refuse(f"{key} is {_shown(value)}; it must be a finite number")
        return float(value)

    def text(self, key: str) -> str | None:
        """A string; None if it is not there.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"{key} is {_shown(value)}; it must be a string")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false if it is not there.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(f"{key} is {_shown(value)}; it must be true or false")
        return bool(value)

    def array(self, key: str, kind: type, words: str) -> list[Any] | None:
        """A list with entries of one type; None if it is not there.

        Args:
            key: its name.
            kind: of the entries; bool is no int.
            words: what the entries are, for the error.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.refuse(f"{key} must be a list of {words}")
        for entry in value:
            if not isinstance(entry, kind) or (isinstance(entry, bool) and kind is not bool):
                raise self.refuse(f"{key} has {_shown(entry)}; it must be a list of {words}")
        return value

    def child(self, key: str) -> Fields | None:
        """An object inside this one; None if it is not there.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(f"{key} is {_shown(value)}; it must be an object")
        return Fields(value, f"{self.place}: {key}")

    def same_as(self, other: Fields) -> bool:
        """Whether two objects say the same."""
        return self._values == other._values

    def with_value(self, key: str, value: object) -> Fields:
        """These fields and one more.

        Raises:
            ConfigError: it is there and says something else.
        """
        own = self.get(key)
        if own is not None and own != value:
            raise self.refuse(f"{key} is {_shown(own)}, and beside it {_shown(value)}")
        return Fields({**self._values, key: value}, self.place)

    def items(self) -> Iterator[tuple[str, Any]]:
        """All fields, as they are."""
        return iter(self._values.items())


def _shown(value: object) -> str:
    return f"{value!r:.40}" if not isinstance(value, float) or math.isfinite(value) else "not finite"


def _listed(found: Mapping[str, object]) -> str:
    return " and ".join(f"{key}={value!r:.40}" for key, value in found.items())
