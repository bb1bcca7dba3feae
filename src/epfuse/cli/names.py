"""Options that take names or token counts with commas between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import click


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
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
        raise click.BadParameter(f"{value!r} is no list of token counts such as 1,16,256")
    return tuple(sorted({int(number) for number in value.split(",")}))
