"""Options that several commands have: names or token counts with commas between them, and a layer's sizes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import click

Command: TypeAlias = Callable[..., None]
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


def adds(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """A decorator that adds options to a command, in their order."""
    return lambda command: functools.reduce(lambda added, option: option(added), reversed(options), command)


def layer_sizes(ranks: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options for a layer's sizes; the command gets ``sizes``, None for those that are the named shape's.

    Args:
        ranks: what --ep-size says.
    """
    options = (
        ("hidden", "H", "Model dimension."),
        ("intermediate", "I", "Width of an expert on this rank."),
        ("experts", "E", "Experts over all ranks."),
        ("top_k", "K", "Routes per token."),
        ("ep_size", "P", ranks),
    )

    def added(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_sizes(**given: Any) -> None:
            command(sizes={name: given.pop(name) for name, _, _ in options}, **given)

        for name, letter, words in reversed(options):
            click.option(f"--{name.replace('_', '-')}", type=SIZE, metavar=letter, help=words)(with_sizes)
        return with_sizes

    return added


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
