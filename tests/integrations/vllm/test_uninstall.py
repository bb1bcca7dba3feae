"""What is left of the plugin: nothing. vLLM's files are its wheel's before, while and after epfuse is installed."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from vllm.model_executor.custom_op import op_registry_oot

from epfuse.integrations.vllm import plugin
from epfuse.integrations.vllm.patch.site import find_site
from tests.integrations.vllm.deployments import M3_EP8, build
from tests.integrations.vllm.patch.sites import snapshot

ROOT = Path(__file__).parents[3]
SITE = Path(vllm.__file__).parents[1]
# what a process of vLLM's does first, and what is registered afterwards
PROBE = """
import sys
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform
vllm.platforms._current_platform = UnspecifiedPlatform()
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.custom_op import op_registry_oot
print(vllm.__file__, [found.__qualname__ for found in op_registry_oot.values()])
"""


def test_running_the_plugin_writes_nothing_into_vllm(monkeypatch):
    before = dict(op_registry_oot)
    plugin._register_once.cache_clear()
    plugin.register()
    build(M3_EP8, monkeypatch)
    op_registry_oot.clear()
    op_registry_oot.update(before)
    plugin._register_once.cache_clear()
    checked = 0
    with (find_site(SITE).metadata / "RECORD").open(newline="") as record:
        for name, digest, _ in csv.reader(record):
            file = SITE / name
            if digest and file.suffix == ".py":
                found = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
                assert digest == f"sha256={found}", name
                checked += 1
    assert checked > 1000


@pytest.fixture
def serving(tmp_path) -> Path:
    """An environment with a copy of vLLM, to install into and to uninstall from."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (packages,) = (tmp_path / "lib").glob("python*/site-packages")
    metadata = find_site(SITE).metadata
    shutil.copytree(SITE / "vllm", packages / "vllm")  # bytecode, too: it stays valid
    shutil.copytree(metadata, packages / metadata.name)
    # everything else that is importable here, but not this checkout
    others = [entry for entry in sys.path if entry.endswith("packages") and Path(entry) != SITE]
    (packages / "others.pth").write_text("\n".join(str(Path(entry).resolve()) for entry in others))
    return packages


def files_of(packages: Path) -> dict[str, bytes]:
    """All files but bytecode, which Python writes when it imports."""
    return {name: content for name, content in snapshot(packages).items() if not name.endswith(".pyc")}


def pip(packages: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--python", str(packages.parents[2]), *arguments]
    subprocess.run(command, check=True, cwd=ROOT)


def registered(packages: Path) -> list[str]:
    """What a fresh process of that environment has registered."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"EPFUSE_STRICT": "1", "VLLM_PLUGINS": "epfuse"}
    args = [str(packages.parents[2] / "bin/python"), "-c", PROBE]
    ended = subprocess.run(args, env=environment, cwd=packages, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    file, _, names = ended.stdout.strip().splitlines()[-1].partition(" ")
    assert Path(file).is_relative_to(packages)
    return ast.literal_eval(names)


def test_uninstalling_leaves_vllm_as_it_was(serving):
    before = files_of(serving)
    pip(serving, "install", "--no-deps", "--no-compile", str(ROOT))
    assert registered(serving) == ["EpfuseRoutedExperts"]
    during = files_of(serving)
    assert {name: during[name] for name in before} == before
    assert all(str(name).startswith("epfuse") for name in set(during) - set(before))
    pip(serving, "uninstall", "--yes", "epfuse")
    assert files_of(serving) == before
    assert registered(serving) == []
