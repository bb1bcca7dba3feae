"""Options that take names or token counts with commas between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import click

MOST_TOKENS = 1 << 20
"""Of one call; servers batch some ten thousand at the most."""
SIZE = click.IntRange(1, 1 << 20)
"""H, I, E, K or P: far above any model's, and small enough for every product of them."""


def comma_names(
    known: Iterable[str],
) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...] | None]:
    """A callback for an option that takes some of ``known``: each once, in the order given; None if it is not given."""
    names = tuple(known)

    def split(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        chosen = tuple(dict.fromkeys(value.split(",")))
        for name in chosen:
            if name not in names:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(names)}")
        return chosen

    return split


def token_counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """A callback for an option that takes token counts: each once, ascending."""
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", value):
        raise click.BadParameter(f"{value!r} is no list of token counts such as 1,16,256")
    return tuple(sorted({token_count(number) for number in value.split(",")}))


def token_count(text: str) -> int:
    """One token count, 1 to `MOST_TOKENS`; click.BadParameter for anything else."""
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text) or int(text) > MOST_TOKENS:
        shown = text if len(text) <= 20 else f"{text[:20]}..."
        raise click.BadParameter(f"{shown!r} is not a token count; it must be an integer, 1 to {MOST_TOKENS}")
    return int(text)
