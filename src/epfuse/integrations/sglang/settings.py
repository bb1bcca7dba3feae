"""SGLang's server settings, which its releases keep in different places."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_server_args


def setting(name: str) -> Any:
    """A server argument as SGLang resolved it; None for one that this SGLang does not have."""
    arguments = get_server_args()
    resolved = getattr(arguments, "resolved_dict", None)
    values = resolved() if callable(resolved) else {}
    return values[name] if name in values else getattr(arguments, name, None)
