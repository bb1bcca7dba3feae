"""Which files are being swapped. It is there while swaps are under way, so a crash leaves it behind."""

from __future__ import annotations

from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.integrations.vllm.patch.block import BEGIN, TARGETS, without_block
from epfuse.integrations.vllm.patch.site import Site
from epfuse.integrations.vllm.patch.swap import discard, swap, temporary

NAME = "epfuse-patch.journal"


def journal(site: Site) -> Path:
    """Where it is while swaps are under way."""
    return site.metadata / NAME


def change(site: Site, contents: dict[str, bytes]) -> None:
    """Swap files in; call under the lock, with every content checked.

    Args:
        site: whose.
        contents: path relative to the site -> what it becomes.
    """
    swap(journal(site), "".join(f"{path}\n" for path in contents).encode())
    for path, content in contents.items():
        swap(site.root / path, content)
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
            swap(site.root / path, without_block(content))
    discard(left_behind)
    return True


def read(site: Site, path: str) -> bytes:
    """A file that the block is or can be in.

    Raises:
        ConfigError: it is missing, or neither the wheel's nor the wheel's with a block; its name is in the message.
    """
    file = site.root / path
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; vLLM {site.release} has it") from None
    if not site.is_recorded(path, without_block(content)):
        raise ConfigError(f"{file} is not the file that vLLM {site.release}'s wheel installed; it is left as it is")
    return content
