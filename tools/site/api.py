"""A page for every public name, and for the parts that people import beside ``epfuse`` itself."""

from __future__ import annotations

import importlib
import inspect

import epfuse

PARTS = {
    "epfuse.policy": "Which weights a layer keeps, and which path a call takes",
    "epfuse.parallel.group": "Expert parallelism over torch.distributed",
    "epfuse.integrations.transformers": "Experts of transformers' models",
    "epfuse.numerics.mxfp8": "The numbers of MXFP8",
    "epfuse.weights.model_config": "What a model's config.json says of its experts",
    "epfuse.planning.model_plan": "A whole model's plan",
}
"""Module -> what it is for; pages beside those of `epfuse.__all__`."""


def pages() -> dict[str, str]:
    """Page -> its text."""
    names = sorted(epfuse.__all__, key=lambda name: (name != "fused_experts", name.lower()))
    found = {"reference/api/index.md": _index(names)}
    for name in names:
        found[f"reference/api/{name}.md"] = f"# {name}\n\n::: epfuse.{name}\n"
    for module, purpose in PARTS.items():
        found[f"reference/api/{module}.md"] = _part(module, purpose)
    return found


def _index(names: list[str]) -> str:
    lines = [
        "# API",
        "",
        "What `import epfuse` gives. These names are stable; [Contributing](../../contributing.md#what-stays-stable)"
        " says what that means. The letters of sizes are explained with [the layer](../../design.md#letters).",
        "",
        "| name | |",
        "| --- | --- |",
        *(f"| [`{name}`]({name}.md) | {summary(getattr(epfuse, name))} |" for name in names),
        "",
        "Parts that are imported by themselves:",
        "",
        "| module | |",
        "| --- | --- |",
        *(f"| [`{module}`]({module}.md) | {purpose} |" for module, purpose in PARTS.items()),
        "",
    ]
    return "\n".join(lines)


def summary(thing: object) -> str:
    """The first line of what ``thing`` says of itself."""
    first = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
    return first.replace("``", "`").replace("|", "\\|")


def _part(module: str, purpose: str) -> str:
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", None)
    members = "" if public is None else f"\n    options:\n      members: [{', '.join(public)}]"
    return f"# {module}\n\n{purpose}.\n\n::: {module}{members}\n"
