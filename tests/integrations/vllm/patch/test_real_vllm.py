"""The patch on a copy of the real vLLM that is on the path."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from epfuse.integrations.vllm.patch import block, run
from epfuse.integrations.vllm.patch.run import PatchState
from epfuse.integrations.vllm.patch.site import Site, find_site
from tests.integrations.vllm.patch.sites import snapshot

SRC = Path(run.__file__).parents[4]
PROBE = """
import vllm.platforms
from tests.integrations.vllm.platform import PretendPlatform
vllm.platforms._current_platform = PretendPlatform()
import vllm.model_executor.layers.fused_moe
from vllm.model_executor.custom_op import op_registry_oot
print(vllm.__file__, [found.__qualname__ for found in op_registry_oot.values()])
"""


@pytest.fixture
def copy(tmp_path) -> Site:
    """A vLLM of links to the real one, whose patched files and metadata are copies."""
    real = find_site(Path(vllm.__file__).parents[1])
    shutil.copytree(real.metadata, tmp_path / real.metadata.name)
    shutil.copytree(real.root / "vllm", tmp_path / "vllm", copy_function=os.symlink)  # bytecode, too: it stays valid
    for target in block.TARGETS:
        (tmp_path / target).unlink()
        shutil.copy2(real.root / target, tmp_path / target)
    return find_site(tmp_path)


def registered(site: Site) -> list[str]:
    """What a fresh process that imports the layers has registered."""
    search = [str(site.root), str(SRC), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "EPFUSE_STRICT": "1"}
    args = [sys.executable, "-c", PROBE]
    ended = subprocess.run(args, env=environment, cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    file, _, names = ended.stdout.strip().splitlines()[-1].partition(" ")
    assert Path(file).is_relative_to(site.root)
    return ast.literal_eval(names)


def test_a_patched_vllm_registers_by_itself(copy):
    before = snapshot(copy.metadata) | {target: (copy.root / target).read_bytes() for target in block.TARGETS}
    assert registered(copy) == []
    assert run.apply(copy).state is PatchState.APPLIED
    assert registered(copy) == ["EpfuseRoutedExperts"]
    assert run.revert(copy).state is PatchState.CLEAN
    assert registered(copy) == []
    after = snapshot(copy.metadata) | {target: (copy.root / target).read_bytes() for target in block.TARGETS}
    assert after == before
