"""The text that the demo reads, and its byte-level tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from epfuse.errors import ConfigError
from epfuse.input_file import read_file

BOS = 256
VOCAB = 257


@dataclass(frozen=True)
class Text:
    """Bytes and where they come from."""

    data: bytes
    source: str


def encode(data: bytes, tokens: int) -> list[int]:
    """BOS, then one token a byte, ``tokens`` of them at most."""
    return [BOS, *data[: tokens - 1]]


def decode(tokens: list[int]) -> str:
    """The bytes of ``tokens`` as text; what is not UTF-8 becomes a replacement character, BOS nothing."""
    return bytes(token for token in tokens if token < BOS).decode("utf-8", "replace")


def read_text(path: Path | None) -> Text:
    """``path``'s bytes; without one the repository's README, else the installed description, else a text shipped here.

    Raises:
        ConfigError: ``path`` can't be read, is empty, or is larger than `input_file` reads.
    """
    if path is not None:
        data = read_file(path, "text file")
        if not data:
            raise ConfigError(f"text file {path} is empty; it must hold at least one byte")
        return Text(data, str(path))
    root = Path(__file__).resolve().parents[3]
    readme = root / "README.md"
    if (root / "pyproject.toml").is_file() and readme.is_file() and readme.stat().st_size:
        return Text(readme.read_bytes(), "README.md")
    description = _description()
    if description:
        return Text(description.encode(), "the installed package's description")
    shipped = resources.files("epfuse.demo").joinpath("text.md").read_bytes()
    return Text(shipped, "a text shipped with epfuse")


def _description() -> str:
    try:
        found = metadata.metadata("epfuse")
    except metadata.PackageNotFoundError:
        return ""
    return str(found.json.get("description", "")).strip()
