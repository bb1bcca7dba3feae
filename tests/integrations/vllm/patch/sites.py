"""Installed vLLMs that have only what the patch looks at."""

from __future__ import annotations

from pathlib import Path

from epfuse.integrations.vllm.patch.block import TARGETS
from epfuse.integrations.vllm.patch.site import Site, find_site, record_hash

SOURCE = b"class RoutedExperts:\n    pass\n"


def make_site(root: Path, release: str = "0.25.1", source: bytes = SOURCE) -> Site:
    metadata = root / f"vllm-{release}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    lines = []
    for target in TARGETS:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).write_bytes(source)
        lines.append(f"{target},sha256={record_hash(source)},{len(source)}\n")
    (metadata / "RECORD").write_text("".join(lines))
    return find_site(root)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
