"""HTML pages that need nothing but themselves: styles and pictures inline, no request to anywhere."""

from __future__ import annotations

from typing import Any

from epfuse.errors import MissingDependency

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as _missing:
    raise MissingDependency("HTML reports need jinja2: pip install 'epfuse[demo]'") from _missing


def render(template: str, **values: Any) -> str:
    """A template of ``epfuse/report/templates`` as text.

    Args:
        template: its file name.
        values: what it uses; every string in them is escaped, and a name that the template misses is an error.
    """
    environment = Environment(
        loader=PackageLoader("epfuse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
