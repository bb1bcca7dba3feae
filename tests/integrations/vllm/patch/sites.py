"""Installed vLLMs that have only what the patch looks at."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.vllm.patch.block import TARGETS
from epfuse.integrations.vllm.patch.site import Site, find_site, record_hash
from tests.integrations.vllm.fake import write_package

(TARGET,) = TARGETS


def make_site(root: Path, release: str = "0.25.1", source: bytes | None = None, like: str = "0.25.1") -> Site:
    """A vLLM whose metadata says ``release``, with the interfaces of ``like`` and other bytes if they are given."""
    write_package(root / "vllm", like)
    if source is not None:
        (root / TARGET).write_bytes(source)
    metadata = root / f"vllm-{release}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    lines = []
    for target in TARGETS:
        content = (root / target).read_bytes()
        lines.append(f"{target},sha256={record_hash(content)},{len(content)}\n")
    (metadata / "RECORD").write_text("".join(lines))
    return find_site(root)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file with its bytes; of a link also where it leads."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[f"{path.relative_to(root)} ->"] = str(path.readlink()).encode()
        if path.is_file():
            found[str(path.relative_to(root))] = path.read_bytes()
    return found
