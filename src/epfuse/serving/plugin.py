"""epfuse as a folder that any interpreter finds through PYTHONPATH, its vLLM plugin included.

An image needs no pip and no network for it: beside the package lies the metadata in which vLLM looks for plugins.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

from epfuse import __version__
from epfuse.errors import ConfigError
from epfuse.serving.point import PutIn

ENTRY_POINTS = "[vllm.general_plugins]\nepfuse = epfuse.integrations.vllm.plugin:register\n"


def place(source: Path, folder: Path, how: PutIn) -> str:
    """Make ``folder`` one that PYTHONPATH may name, from a wheel or a folder.

    Args:
        source: a wheel of epfuse, a checkout, or a folder with the package ``epfuse`` in it.
        folder: made new; its parent exists.
        how: with PATCH there is no plugin's metadata, or vLLM would load epfuse twice.

    Returns:
        SHA-256 over all that lies there.

    Raises:
        ConfigError: ``source`` is none of these.
        OSError: it can't be read, or ``folder`` not written.
    """
    folder.mkdir()
    if source.suffix == ".whl":
        try:
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(folder)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"epfuse_source is {str(source)!r}, which is no wheel: {error}") from None
    else:
        package = next((at for at in (source / "src" / "epfuse", source / "epfuse") if at.is_dir()), None)
        if package is None:
            raise ConfigError(f"epfuse_source is {str(source)!r}; it must be a wheel or have the folder epfuse in it")
        shutil.copytree(package, folder / "epfuse", ignore=shutil.ignore_patterns("__pycache__"))
    if not (folder / "epfuse" / "__init__.py").is_file():
        raise ConfigError(f"epfuse_source is {str(source)!r}; there is no package epfuse in it")
    for metadata in folder.glob("*.dist-info"):
        shutil.rmtree(metadata)
    if how is PutIn.PLUGIN:
        metadata = folder / f"epfuse-{__version__}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: epfuse\nVersion: {__version__}\n")
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return digest(folder)


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files but bytecode."""
    total = hashlib.sha256()
    for file in sorted(at for at in folder.rglob("*") if at.is_file() and "__pycache__" not in at.parts):
        name = file.relative_to(folder).as_posix().encode()
        total.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
