"""What public functions ask of their arguments; a refusal names the argument, its value and what it must be."""

from __future__ import annotations

import enum
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence

from epfuse.errors import ConfigError

E = typing.TypeVar("E", bound=enum.Enum)
F = typing.TypeVar("F", bound=Callable[..., typing.Any])

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def integer(name: str, value: object, least: int = 0, most: int = 2**31 - 1) -> int:
    """``value`` as an int; numpy's integers are integers too, booleans and tensors are not.

    Args:
        name: what an error calls the argument.
        value: what was given.
        least: the smallest value that makes sense.
        most: the largest one; sizes that kernels count with stay below 2**31.

    Raises:
        ConfigError: not an integer, or out of range.
    """
    if type(value) is int and least <= value <= most:  # nearly always; asking for an abstract class takes longer
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} is {shown(value)}; it must be an integer")
    number = int(value)
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ConfigError(f"{name} is {shown(number)}; it must be {bound}")
    return number


def real(name: str, value: object) -> float:
    """``value`` as a float that float32, in which kernels take it, can hold; infinities and NaN pass.

    Raises:
        ConfigError: no real number, or one whose size float32 can't hold.
    """
    if type(value) is float and abs(value) <= LARGEST_FLOAT32:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} is {shown(value)}; it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.nan
    if (math.isnan(number) and value == value) or LARGEST_FLOAT32 < abs(number) < math.inf:
        raise ConfigError(f"{name} is {shown(value)}; it must be within float32's range, +-{LARGEST_FLOAT32:.3g}")
    return number


def member(name: str, value: object, kind: type[E]) -> E:
    """``value``, if it is a member of ``kind``. Its name is not: a comparison would take it for another member.

    Raises:
        ConfigError: as said; the message lists the members.
    """
    if isinstance(value, kind):
        return value
    known = ", ".join(f"{kind.__name__}.{one.name}" for one in kind)
    raise ConfigError(f"{name} is {shown(value)}; it must be an epfuse.{kind.__name__}: {known}")


def checks_enums(subject: F) -> F:
    """Decorate a function, or a dataclass, whose arguments are enums: what is no member is refused before it runs.

    The annotations say which arguments these are: ``Kind``, ``Kind | None``, or a tuple, list or set of them.
    """
    if isinstance(subject, type):
        subject.__init__ = _checking(subject.__init__)  # type: ignore[misc]
        return subject
    return typing.cast("F", _checking(subject))


def _checking(function: Callable[..., object]) -> Callable[..., object]:
    code = function.__code__
    position = {name: index for index, name in enumerate(code.co_varnames[: code.co_argcount])}

    @functools.cache  # annotations are read at the first call, when all modules are loaded
    def rules() -> list[_Rule]:
        return [_Rule(position.get(name, sys.maxsize), name, *found) for name, found in enums_of(function).items()]

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        for place, name, kind, optional, many in rules():
            value = args[place] if place < len(args) else kwargs.get(name, checked)
            if value is checked or type(value) is kind or (optional and value is None):  # not given: the default
                continue
            if not many:
                member(name, value, kind)
            elif isinstance(value, str) or not isinstance(value, Collection):
                raise ConfigError(f"{name} is {shown(value)}; it must hold {kind.__name__} members")
            else:
                for one in value:
                    member(f"an item of {name}", one, kind)
        return function(*args, **kwargs)

    return checked


class _Rule(typing.NamedTuple):
    """One argument that is an enum.

    Attributes:
        place: its position.
        name: its name.
        kind: the enum.
        optional: whether None will do.
        many: whether it is a collection of members.
    """

    place: int
    name: str
    kind: type[enum.Enum]
    optional: bool
    many: bool


def enums_of(function: Callable[..., object]) -> dict[str, tuple[type[enum.Enum], bool, bool]]:
    """The arguments that are enums: name -> (the enum, whether None will do, whether it is a collection of them)."""
    found = {}
    for name, hint in typing.get_type_hints(function).items():
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        for option in options:
            inside = typing.get_args(option)
            many = bool(inside) and typing.get_origin(option) in _COLLECTIONS
            kind = inside[0] if many else option
            if name != "return" and isinstance(kind, type) and issubclass(kind, enum.Enum):
                found[name] = (kind, type(None) in options, many)
    return found


_COLLECTIONS = (tuple, list, set, frozenset, Collection, Sequence)


def shown(value: object) -> str:
    """``value`` in an error: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is not None and not isinstance(value, str | bytes | numbers.Number | enum.Enum):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
