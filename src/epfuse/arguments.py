"""What public functions ask of their arguments; a refusal names the argument, its value and what it must be."""

from __future__ import annotations

import enum
import numbers

from epfuse.errors import ConfigError


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
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} is {shown(value)}; it must be an integer")
    number = int(value)
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ConfigError(f"{name} is {shown(number)}; it must be {bound}")
    return number


def shown(value: object) -> str:
    """``value`` in an error: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is not None and not isinstance(value, str | bytes | numbers.Number | enum.Enum):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
