"""Text from files, made fit for a terminal, a page and a JSON record."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f"  # control characters move the cursor
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line ends, and what turns the direction of reading round
    r"\ud800-\udfff\ufffe\uffff]"  # no characters at all: neither UTF-8 nor XML can hold them
)


def printable(text: str) -> str:
    """``text`` with U+FFFD for each character that could do something other than be seen."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
