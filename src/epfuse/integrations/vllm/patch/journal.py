"""Which files are being swapped. It is there while swaps are under way, so a crash leaves it behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.input_file import read_file
from epfuse.integrations.vllm.patch.block import BEGIN, TARGETS, without_block
from epfuse.integrations.vllm.patch.site import Site
from epfuse.integrations.vllm.patch.swap import bring_back, discard, kept_link, swap, temporary

NAME = "epfuse-patch.journal"


def journal(site: Site) -> Path:
    """Where it is while swaps are under way."""
    return site.metadata / NAME


def change(site: Site, paths: Iterable[str], step: Callable[[str], None]) -> None:
    """Change files one by one; call under the lock, with everything checked.

    Args:
        site: whose.
        paths: relative to the site.
        step: what is done with each; before and after it, and in between, a file is whole.
    """
    paths = tuple(paths)
    swap(journal(site), "".join(f"{path}\n" for path in paths).encode())
    try:
        for path in paths:
            step(path)
    except BaseException:  # a full disk, or Ctrl-C
        with suppress(OSError, ConfigError):  # else the next call does it
            undo_interrupted(site)
        raise
    discard(journal(site))


def undo_interrupted(site: Site) -> bool:
    """Bring every file back to the wheel's if a change was interrupted; call under the lock.

    Returns:
        Whether one was.

    Raises:
        ConfigError: a file is neither the wheel's nor the wheel's with a block.
    """
    left_behind = journal(site)
    for name in (*TARGETS, left_behind.relative_to(site.root).as_posix()):
        discard(temporary(site.root / name))
    if not left_behind.exists():
        return False
    for path in TARGETS:
        content = read(site, path)
        if BEGIN in content:
            bring_back(site.root / path, without_block(content))
        else:
            discard(kept_link(site.root / path))
    discard(left_behind)
    return True


def read(site: Site, path: str) -> bytes:
    """A file that the block is or can be in.

    Raises:
        ConfigError: it can't be read, is neither the wheel's nor the wheel's with a block, or is a link to a file with
            one; its name is in the message.
    """
    file = site.root / path
    if not os.path.lexists(file):
        raise ConfigError(f"{file} is missing; vLLM {site.release} has it")
    content = read_file(file, "vLLM's file")
    if not site.is_recorded(path, without_block(content)):
        raise ConfigError(f"{file} is not the file that vLLM {site.release}'s wheel installed; it is left as it is")
    if BEGIN in content and file.is_symlink():
        raise ConfigError(f"{file} is a link to {file.resolve()}, which is patched itself; revert it where it lies")
    return content
