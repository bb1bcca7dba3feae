"""The lines that are added to vLLM, and a file with and without them.

They go to the end of the file that defines RoutedExperts, so nothing of the file has to be found or moved. vLLM's
oracles are left alone: they see a layer's configuration, but neither its expert map nor its activation's parameters.
"""

from __future__ import annotations

TARGETS = ("vllm/model_executor/layers/fused_moe/routed_experts.py",)
"""Files that get the block, relative to site-packages."""
BEGIN = b"# >>> epfuse >>>\n"
END = b"# <<< epfuse <<<\n"
BLOCK = (
    BEGIN
    + b"from epfuse.integrations.vllm.plugin import register as _register_epfuse  # noqa: E402\n\n"
    + b"_register_epfuse()\n"
    + END
)


def with_block(original: bytes) -> bytes:
    """The file with the block at its end."""
    return original + BLOCK


def without_block(content: bytes) -> bytes:
    """The file as it was before any version's block; unchanged if it has none."""
    return content.partition(BEGIN)[0]


def has_this_block(content: bytes) -> bool:
    """Whether the file ends with exactly the block of this version."""
    return content == with_block(without_block(content))
