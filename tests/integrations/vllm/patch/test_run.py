"""The patch on sites that are whole, foreign, half patched, and shared by eight processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.integrations.vllm.patch import block, run
from epfuse.integrations.vllm.patch.journal import journal
from epfuse.integrations.vllm.patch.run import State
from epfuse.integrations.vllm.patch.site import find_site
from tests.integrations.vllm.patch.sites import SOURCE, make_site, snapshot

TARGET = block.TARGETS[0]
SRC = Path(run.__file__).parents[4]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC)}


def test_apply_and_revert_leave_every_byte_as_it_was(tmp_path):
    site = make_site(tmp_path)
    before = snapshot(tmp_path)
    assert run.status(site).state is State.CLEAN
    assert run.apply(site) == run.Report(site, State.APPLIED, changed=True)
    after = snapshot(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {TARGET}
    assert after[TARGET] == SOURCE + block.BLOCK
    assert run.apply(site) == run.Report(site, State.APPLIED, changed=False)
    assert snapshot(tmp_path) == after
    assert run.revert(site) == run.Report(site, State.CLEAN, changed=True)
    assert snapshot(tmp_path) == before
    assert not run.revert(site).changed


def test_the_files_mode_stays(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / TARGET).chmod(0o640)
    run.apply(site)
    assert (tmp_path / TARGET).stat().st_mode & 0o7777 == 0o640


@pytest.mark.parametrize("action", [run.apply, run.revert])
def test_a_changed_file_is_refused_by_name(action, tmp_path):
    site = make_site(tmp_path)
    (tmp_path / TARGET).write_bytes(SOURCE + b"# edited\n")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=TARGET):
        action(site)
    assert snapshot(tmp_path) == before
    assert run.status(site).state is State.UNKNOWN


def test_a_missing_file_is_refused_by_name(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / TARGET).unlink()
    with pytest.raises(ConfigError, match=TARGET):
        run.apply(site)


def test_lines_after_the_block_are_not_taken_for_a_patch(tmp_path):
    site = make_site(tmp_path)
    run.apply(site)
    with (tmp_path / TARGET).open("ab") as file:
        file.write(b"# more\n")
    assert run.status(site).state is State.OUTDATED


def test_another_versions_block_is_replaced(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / TARGET).write_bytes(SOURCE + block.BEGIN + b"import older\n" + block.END)
    assert run.status(site).state is State.OUTDATED
    assert run.apply(site).state is State.APPLIED
    assert run.revert(site).state is State.CLEAN
    assert (tmp_path / TARGET).read_bytes() == SOURCE


def test_an_untested_release_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"0\.24\.0; the patch is for 0\.25\.1, "):
        make_site(tmp_path, release="0.24.0")


def test_a_directory_without_vllm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no vLLM is installed in"):
        find_site(tmp_path)


def test_a_vllm_without_record_is_refused(tmp_path):
    site = make_site(tmp_path)
    (site.metadata / "RECORD").unlink()
    with pytest.raises(ConfigError, match="has no RECORD"):
        find_site(tmp_path)


def test_source_that_does_not_compile_is_not_swapped_in(tmp_path):
    site = make_site(tmp_path, source=b"class RoutedExperts\n")
    before = snapshot(tmp_path)
    with pytest.raises(SyntaxError):
        run.apply(site)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_kill_at_any_system_call_is_recovered(action, when, tmp_path):
    call = 0
    while True:
        call += 1
        root = tmp_path / str(call)
        site = make_site(root)
        original = snapshot(root)
        if action == "revert":
            run.apply(site)
        args = [sys.executable, "-m", "tests.integrations.vllm.patch.killed", str(root), action, str(call), when]
        ended = subprocess.run(args, env=ENVIRONMENT, cwd=Path(__file__).parents[4], capture_output=True, text=True)
        content = (root / TARGET).read_bytes()
        assert content in (SOURCE, SOURCE + block.BLOCK), "a file is never a part of either"
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert run.status(site).state in (State.CLEAN, State.APPLIED, State.INTERRUPTED)
        assert run.apply(site).state is State.APPLIED
        assert not journal(site).exists()
        assert run.revert(site).state is State.CLEAN
        assert snapshot(root) == original
    assert call > 10  # lock, journal written and synced, file written, synced and renamed, journal removed


def test_eight_processes_apply_it_once(tmp_path):
    make_site(tmp_path)
    args = [sys.executable, "-m", "epfuse", "vllm", "patch", "apply", "--site", str(tmp_path)]
    ranks = [subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8
    assert sum("(changed)" in text for text in said) == 1
    assert (tmp_path / TARGET).read_bytes() == SOURCE + block.BLOCK
