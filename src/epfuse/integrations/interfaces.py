"""What epfuse uses of a server, read from its source without importing it, and which tested release has the same.

A build of a tested release may have any version text, and any change; whether epfuse fits is decided by how the classes
look. Where a class lists what a layer can be told or asked, the whole list counts: epfuse would ignore what a build
adds there.
"""

from __future__ import annotations

import ast
import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError
from epfuse.input_file import read_file, read_json

Parts = tuple[str, ...]
Interfaces = dict[str, Parts]


class What(enum.Enum):
    """Which parts of a thing count."""

    PARAMETERS = "parameters of"
    """All, of a function, in their order."""
    FIELDS = "fields of"
    """All, of a dataclass."""
    MEMBERS = "members of"
    """All, of a class."""
    NAMES = "names in"
    """Those that are used, of a module, a class and what its methods set on ``self``."""


@checks_enums
@dataclass(frozen=True)
class InterfaceUse:
    """One thing of vLLM's that epfuse calls, reads, overrides or replaces.

    Attributes:
        what: which of its parts count.
        file: below ``vllm/``.
        of: a class, or a function ``name`` or ``Class.name``; empty for the module.
        names: with NAMES, the used ones.
    """

    what: What
    file: str
    of: str = ""
    names: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.what.value} {self.of} ({self.file})" if self.of else f"{self.what.value} {self.file}"


def names_in(file: str, of: str, names: str) -> InterfaceUse:
    """An `InterfaceUse` of a module's or class's ``names``, given in one string."""
    return InterfaceUse(What.NAMES, file, of, frozenset(names.split()))


@dataclass(frozen=True)
class Match:
    """The tested release that a server is most like.

    Attributes:
        release: which.
        differences: a phrase for each thing that epfuse uses and that is not the same; empty if epfuse fits.
    """

    release: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        shown, more = "; ".join(self.differences[:3]), len(self.differences) - 3
        return f"{shown}{f'; and {more} more' if more > 0 else ''}, compared with {self.release}"


@dataclass(frozen=True)
class ServerProject:
    """A server that epfuse plugs into.

    Attributes:
        name: as its project writes it.
        record: JSON, tested release -> "digest" of the files, and "uses": use -> its parts in one string.
        uses: all that epfuse uses of it.
    """

    name: str
    record: Path
    uses: tuple[InterfaceUse, ...]

    def read(self, package: Path) -> Interfaces:
        """What an installation has of all that epfuse uses; nothing of it is run.

        Args:
            package: the directory that its modules are in.

        Returns:
            By use, the parts that are there, sorted (parameters in their order); none where a file or class is missing.
        """
        modules: dict[str, ast.Module | None] = {}
        found: Interfaces = {}
        for use in self.uses:
            if use.file not in modules:
                modules[use.file] = _parsed(package / use.file, f"{self.name}'s")
            module = modules[use.file]
            found[str(use)] = () if module is None else _parts(module, use)
        return found

    def digest(self, package: Path) -> str | None:
        """SHA-256 of the files that `read` reads, in hex: equal bytes have equal interfaces; None if one can't be read.

        Args:
            package: the directory that its modules are in.
        """
        found = hashlib.sha256()
        for file in sorted({use.file for use in self.uses}):
            try:
                content = read_file(package / file, f"{self.name}'s")
            except ConfigError:
                return None
            found.update(f"{file}\0{len(content)}\0".encode() + content)
        return found.hexdigest()

    @cached_property
    def _record(self) -> dict[str, Any]:
        return dict(read_json(self.record, f"record of {self.name}'s interfaces"))

    @cached_property
    def known(self) -> dict[str, Interfaces]:
        """Tested release -> what it has."""
        return {
            release: {use: tuple(parts.split()) for use, parts in found["uses"].items()}
            for release, found in self._record.items()
        }

    @cached_property
    def digests(self) -> dict[str, str]:
        """`digest` of a tested release -> the release."""
        return {found["digest"]: release for release, found in self._record.items()}

    def nearest(self, package: Path) -> Match:
        """The tested release whose interfaces an installation shares, or the one that it shares most with.

        Every process of a server asks this when it starts. Where the files are a tested release's byte for byte they
        are not parsed, which takes half a second.

        Args:
            package: the directory that its modules are in.
        """
        same = self.digests.get(self.digest(package) or "")
        if same is not None:
            return Match(same, ())
        found = self.read(package)
        matches = [Match(release, _differences(known, found)) for release, known in self.known.items()]
        return min(reversed(matches), key=lambda match: len(match.differences))  # of equals the newest


def _differences(known: Interfaces, found: Interfaces) -> tuple[str, ...]:
    phrases = []
    for use, expected in known.items():
        parts = found.get(use, ())
        if parts == expected:
            continue
        lacks, adds = [p for p in expected if p not in parts], [p for p in parts if p not in expected]
        said = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"adds {', '.join(adds)}"] * bool(adds)
        phrases.append(f"{use} {'is missing' if not parts else ' and '.join(said) or 'has another order'}")
    return tuple(phrases)


def _parsed(file: Path, whose: str) -> ast.Module | None:
    try:
        return ast.parse(read_file(file, whose))
    except (ConfigError, SyntaxError, ValueError, RecursionError):
        return None


def _parts(module: ast.Module, use: InterfaceUse) -> Parts:
    scope: ast.AST | None = module
    for name in filter(None, use.of.split(".")):
        scope = None if scope is None else _definition(scope, name)
    match use.what, scope:
        case What.PARAMETERS, ast.FunctionDef() | ast.AsyncFunctionDef():
            return _parameters(scope)
        case What.FIELDS, ast.ClassDef():
            return tuple(sorted(_fields(scope)))
        case What.MEMBERS, ast.ClassDef():
            return tuple(sorted(set(_names(scope))))
        case What.NAMES, ast.ClassDef():
            return tuple(sorted(use.names & {*_names(scope), *_assigned_to_self(scope)}))
        case What.NAMES, ast.Module():
            return tuple(sorted(use.names & set(_names(scope))))
        case _:
            return ()


def _definition(scope: ast.AST, name: str) -> ast.AST | None:
    """The last class or function of that name: overloads come before it."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return next((node for node in reversed([*_body(scope)]) if isinstance(node, kinds) and node.name == name), None)


def _body(scope: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module or class, with those under its conditions."""
    for statement in getattr(scope, "body", []):
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _body(statement)
            yield from _body(ast.Module(body=statement.orelse, type_ignores=[]))


def _names(scope: ast.AST) -> Iterator[str]:
    """What a module or a class defines; a string also as ``name='value'``, as enums have it."""
    for statement in _body(scope):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id
                    if isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                        yield f"{target.id}={statement.value.value!r}"


def _fields(scope: ast.ClassDef) -> Iterator[str]:
    for statement in scope.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id


def _assigned_to_self(scope: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(scope):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                yield node.attr


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Parts:
    """In their order; ``=`` after those that have a default."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    found = [f"{arg.arg}{'=' if place >= required else ''}" for place, arg in enumerate(positional)]
    found += [f"*{given.vararg.arg}"] if given.vararg else ["*"] * bool(given.kwonlyargs)
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append(f"{arg.arg}{'' if default is None else '='}")
    return (*found, f"**{given.kwarg.arg}") if given.kwarg else tuple(found)
