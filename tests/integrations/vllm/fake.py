"""Sources that look like a vLLM release where epfuse touches it, written from the record of that release."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.interfaces import InterfaceUse, What
from epfuse.integrations.vllm.interfaces import USES, VLLM


def use_of(of: str, what: What) -> InterfaceUse:
    """The one use of that name."""
    (found,) = (use for use in USES if use.of == of and use.what is what)
    return found


def write_package(package: Path, release: str, changed: dict[InterfaceUse, tuple[str, ...]] | None = None) -> None:
    """A ``vllm`` directory with the interfaces of ``release``, but for those that are ``changed``."""
    known = VLLM.known[release]
    sources: dict[str, dict[str, list[str]]] = {}
    for use in sorted(USES, key=lambda use: use.what is What.PARAMETERS):  # the last definition of a name counts
        parts = (changed or {}).get(use, known[str(use)])
        owner, _, function = use.of.rpartition(".") if use.what is What.PARAMETERS else (use.of, "", "")
        statements = sources.setdefault(use.file, {}).setdefault(owner, ["..."])
        if use.what is What.PARAMETERS:
            statements.append(f"def {function}({', '.join(map(_parameter, parts))}): ...")
        elif use.what is What.FIELDS:
            statements += [f"{name}: object" for name in parts]
        else:
            statements += [name if "=" in name else f"def {name}(): ..." for name in parts]
    for file, scopes in sources.items():
        lines: list[str] = []
        for owner, statements in scopes.items():
            lines += [f"class {owner}:", *(f"    {line}" for line in statements)] if owner else statements
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("".join(f"{line}\n" for line in lines))


def _parameter(part: str) -> str:
    return f"{part}None" if part.endswith("=") else part
