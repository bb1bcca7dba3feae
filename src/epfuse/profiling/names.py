"""Kernel names for people: a template's arguments say less than they take room."""

from __future__ import annotations

import re

_RETURN_TYPE = re.compile(r"^(void|static|__global__) ")
_TENSILE = re.compile(r"^(Cijk_[A-Za-z]+_[A-Za-z]+)_\w*?(?=MT\d)")  # what comes before the tile is the same for all
_LITERAL = re.compile(r"L[a-z]\d+E")  # a template argument that is a number
_LENGTH_AND_NAME = re.compile(r"(\d{1,3})(?=[A-Za-z_])")


def short_name(name: str, width: int = 56) -> str:
    """At most ``width`` characters that tell a kernel from its neighbours: no return type, templates or arguments."""
    text = (
        _mangled_parts(name)
        if name.startswith("_ZN")
        else _RETURN_TYPE.sub("", name).replace("(anonymous namespace)::", "")
    )
    text = _TENSILE.sub(r"\1_", _without_brackets(text))
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _without_brackets(text: str) -> str:
    """Without template and argument lists, but with what stands behind ``::`` after them."""
    kept: list[str] = []
    depth = 0
    for position, character in enumerate(text):
        if character in "<(" and position:
            depth += 1
        elif character in ">)" and depth:
            depth -= 1
        elif not depth:
            kept.append(character)
    return "".join(kept).strip() or text


def _mangled_parts(name: str) -> str:
    """The first four identifiers of a mangled C++ name, joined by ``::``."""
    name = _LITERAL.sub("", name)
    parts: list[str] = []
    position = 3
    while len(parts) < 4 and (match := _LENGTH_AND_NAME.search(name, position)):
        begin = match.end()
        end = begin + int(match[1])
        if end > len(name):
            break
        parts.append(name[begin:end])
        position = end
    return "::".join(parts) or name
