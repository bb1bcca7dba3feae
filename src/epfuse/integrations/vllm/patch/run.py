"""status, apply, verify, revert: each under the lock, each first undoing what a crash left half done."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any

from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError
from epfuse.integrations.vllm.interfaces import VLLM
from epfuse.integrations.vllm.patch.block import BEGIN, END, TARGETS, has_this_block, with_block, without_block
from epfuse.integrations.vllm.patch.journal import change, journal, read, undo_interrupted
from epfuse.integrations.vllm.patch.site import Site
from epfuse.integrations.vllm.patch.swap import bring_back, keep_link, swap
from epfuse.integrations.vllm.releases import TESTED


class PatchState(enum.Enum):
    """What a vLLM's files are."""

    CLEAN = "clean"
    """As the wheel installed them."""
    APPLIED = "applied"
    """Patched by this version of epfuse."""
    OUTDATED = "outdated"
    """Patched by another version, or only a part of them."""
    INTERRUPTED = "interrupted"
    """A change was not finished; the next apply or revert undoes it first."""
    UNKNOWN = "unknown"
    """A file is neither the wheel's nor the wheel's with a patch; nothing will be changed."""


@checks_enums
@dataclass(frozen=True)
class Report:
    """What was found, and what was done.

    Attributes:
        site: whose files.
        state: of the files now.
        changed: whether this call changed a file.
        detail: a sentence; empty where the state says it all.
    """

    site: Site
    state: PatchState
    changed: bool = False
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "site": str(self.site.root),
            "vllm": self.site.release,
            "state": self.state.value,
            "changed": self.changed,
            "detail": self.detail,
        }


def status(site: Site) -> Report:
    """Look, and change nothing; says too where this vLLM does not look like a tested release."""
    with site.locked():
        report = _look(site)
    match = VLLM.nearest(site.root / "vllm")
    if match.differences and not report.detail:
        return replace(report, detail=f"It is not as the releases that epfuse was tested with: {match}")
    return report


def apply(site: Site) -> Report:
    """Patch what is not patched; does nothing where it is done already, however many call at once.

    Raises:
        ConfigError: the vLLM does not look like a tested release, a file is unknown or can't be written, or another
            process holds the lock; nothing was changed.
    """
    with site.locked():
        undone = undo_interrupted(site)
        contents = {path: read(site, path) for path in TARGETS}
        _check_interfaces(site)
        wanted = {path: with_block(without_block(content)) for path, content in contents.items()}
        todo = {path: content for path, content in wanted.items() if content != contents[path]}
        for path, content in todo.items():
            _check_source(site, path, content)  # before anything is swapped in

        def patch(path: str) -> None:
            if BEGIN not in contents[path]:
                keep_link(site.root / path)
            swap(site.root / path, todo[path])

        if todo:
            change(site, todo, patch)
        return Report(site, _checked(site), undone or bool(todo))


def revert(site: Site) -> Report:
    """Bring back the wheel's own bytes, and the link if the file was one.

    Raises:
        ConfigError: a file is unknown or can't be written, or another process holds the lock; nothing was changed.
    """
    with site.locked():
        undone = undo_interrupted(site)
        contents = {path: read(site, path) for path in TARGETS}
        todo = {path: without_block(content) for path, content in contents.items() if BEGIN in content}
        if todo:
            change(site, todo, lambda path: bring_back(site.root / path, todo[path]))
        return Report(site, _look(site).state, undone or bool(todo))


def _check_interfaces(site: Site) -> None:
    match = VLLM.nearest(site.root / "vllm")
    if match.differences:
        raise ConfigError(
            f"vLLM {site.release} in {site.root} is not as the releases that epfuse was tested with,"
            f" {', '.join(TESTED)}: {match}; it is left as it is"
        )


def _check_source(site: Site, path: str, content: bytes) -> None:
    try:
        compile(content, path, "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{site.root / path} with the patch is no Python source: {error}; it is left as it is"
        ) from None


def _look(site: Site) -> Report:
    try:
        contents = [read(site, path) for path in TARGETS]
    except ConfigError as error:
        return Report(site, PatchState.UNKNOWN, detail=str(error))
    if journal(site).exists():
        return Report(site, PatchState.INTERRUPTED, detail=f"{journal(site)} was left behind by a crash")
    if all(map(has_this_block, contents)):
        return Report(site, PatchState.APPLIED)
    return Report(site, PatchState.OUTDATED if any(BEGIN in content for content in contents) else PatchState.CLEAN)


def _checked(site: Site) -> PatchState:
    """The state after patching, from what is on the disk.

    Raises:
        ConfigError: a marker is not where it must be.
    """
    for path in TARGETS:
        content = (site.root / path).read_bytes()
        if content.count(BEGIN) != 1 or not content.endswith(END):
            raise ConfigError(f"{site.root / path} was patched, but its markers are not there")
    return _look(site).state
