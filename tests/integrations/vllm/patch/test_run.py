"""The patch on sites that are whole, foreign, half patched, and shared by eight processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.integrations.interfaces import What
from epfuse.integrations.vllm.patch import block, run
from epfuse.integrations.vllm.patch.journal import journal
from epfuse.integrations.vllm.patch.run import PatchState
from epfuse.integrations.vllm.patch.site import Site, find_site
from epfuse.report import folder_lock as lock
from tests.integrations.vllm.fake import use_of
from tests.integrations.vllm.patch.killed import killed_at
from tests.integrations.vllm.patch.sites import TARGET, make_site, snapshot

SRC = Path(run.__file__).parents[4]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC)}


def test_apply_and_revert_leave_every_byte_as_it_was(tmp_path):
    site = make_site(tmp_path)
    before = snapshot(tmp_path)
    assert run.status(site).state is PatchState.CLEAN
    assert run.apply(site) == run.Report(site, PatchState.APPLIED, changed=True)
    after = snapshot(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {TARGET}
    assert after[TARGET] == before[TARGET] + block.BLOCK
    assert run.apply(site) == run.Report(site, PatchState.APPLIED, changed=False)
    assert snapshot(tmp_path) == after
    assert run.revert(site) == run.Report(site, PatchState.CLEAN, changed=True)
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
    (tmp_path / TARGET).write_bytes((tmp_path / TARGET).read_bytes() + b"# edited\n")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=TARGET):
        action(site)
    assert snapshot(tmp_path) == before
    assert run.status(site).state is PatchState.UNKNOWN


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
    assert run.status(site).state is PatchState.OUTDATED


def test_another_versions_block_is_replaced(tmp_path):
    site = make_site(tmp_path)
    source = (tmp_path / TARGET).read_bytes()
    (tmp_path / TARGET).write_bytes(source + block.BEGIN + b"import older\n" + block.END)
    assert run.status(site).state is PatchState.OUTDATED
    assert run.apply(site).state is PatchState.APPLIED
    assert run.revert(site).state is PatchState.CLEAN
    assert (tmp_path / TARGET).read_bytes() == source


@pytest.mark.parametrize("release", ["0.33.0", "0.33.0.post1", "0.33.1.dev7+g1a2b3c4d", "0.34.0"])
def test_the_text_of_the_version_does_not_decide(release, tmp_path):
    site = make_site(tmp_path, release=release, like="0.33.0")
    assert run.apply(site).state is PatchState.APPLIED
    assert run.revert(site).state is PatchState.CLEAN


def test_a_vllm_that_looks_otherwise_is_refused_by_what_differs(tmp_path):
    site = make_site(tmp_path, release="0.33.0", like="0.33.0")
    file = tmp_path / "vllm" / use_of("FusedMoEConfig", What.FIELDS).file
    file.write_text(file.read_text().replace("swiglu_limit: object", "swiglu_bound: object"))
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"fields of FusedMoEConfig .* lacks swiglu_limit and adds swiglu_bound"):
        run.apply(site)
    assert snapshot(tmp_path) == before
    assert "lacks swiglu_limit and adds swiglu_bound" in run.status(site).detail


def test_a_vllm_without_a_version_is_patched(tmp_path):
    make_site(tmp_path)
    (tmp_path / "vllm-0.25.1.dist-info/METADATA").write_text("Name: vllm\n")
    site = find_site(tmp_path)
    assert site.release == "unknown"
    assert run.apply(site).state is PatchState.APPLIED


def test_a_record_that_is_no_utf_8_is_read(tmp_path):
    make_site(tmp_path)
    record = tmp_path / "vllm-0.25.1.dist-info/RECORD"
    record.write_bytes(b"vllm/caf\xe9.py,sha256=x,1\n" + record.read_bytes())
    assert run.apply(find_site(tmp_path)).state is PatchState.APPLIED


def test_two_vllms_are_refused(tmp_path):
    make_site(tmp_path)
    make_site(tmp_path / "other", release="0.32.0").metadata.rename(tmp_path / "vllm-0.32.0.dist-info")
    with pytest.raises(ConfigError, match=r"has vllm-0\.25\.1\.dist-info and vllm-0\.32\.0\.dist-info"):
        find_site(tmp_path)


def test_a_directory_without_vllm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no vLLM is installed in"):
        find_site(tmp_path)


def test_a_vllm_without_record_is_refused(tmp_path):
    site = make_site(tmp_path)
    (site.metadata / "RECORD").unlink()
    with pytest.raises(ConfigError, match="has no RECORD"):
        find_site(tmp_path)


def test_source_that_does_not_compile_is_not_swapped_in(tmp_path, monkeypatch):
    site = make_site(tmp_path)
    monkeypatch.setattr(block, "BLOCK", block.BEGIN + b"import\n" + block.END)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="is no Python source"):
        run.apply(site)
    assert snapshot(tmp_path) == before


def link_target(site: Site) -> None:
    """As installers do that keep one copy of a package for all environments."""
    cache = site.root / "cache.py"
    (site.root / TARGET).rename(cache)
    (site.root / TARGET).symlink_to(os.path.relpath(cache, (site.root / TARGET).parent))


def test_a_link_is_a_link_again_and_what_it_leads_to_is_never_written(tmp_path):
    site = make_site(tmp_path)
    link_target(site)
    before = snapshot(tmp_path)
    assert run.apply(site).state is PatchState.APPLIED
    assert not (tmp_path / TARGET).is_symlink()
    assert snapshot(tmp_path)["cache.py"] == before["cache.py"]
    (tmp_path / TARGET).write_bytes(before[TARGET] + block.BEGIN + b"import older\n" + block.END)
    assert run.apply(site).state is PatchState.APPLIED  # over another version's
    assert run.revert(site).state is PatchState.CLEAN
    assert snapshot(tmp_path) == before


def test_a_link_of_an_earlier_installation_is_forgotten(tmp_path):
    site = make_site(tmp_path)
    link_target(site)
    run.apply(site)
    (tmp_path / TARGET).unlink()
    (tmp_path / TARGET).write_bytes((tmp_path / "cache.py").read_bytes())  # installed again, as a file
    run.apply(site)
    run.revert(site)
    assert not (tmp_path / TARGET).is_symlink()
    assert [path.name for path in (tmp_path / TARGET).parent.glob(".*epfuse*")] == []


def test_a_link_to_a_patched_file_is_refused(tmp_path):
    site = make_site(tmp_path)
    run.apply(site)
    link_target(site)
    before = snapshot(tmp_path)
    for action in (run.apply, run.revert):
        with pytest.raises(ConfigError, match=r"is a link to .*cache\.py, which is patched itself"):
            action(site)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_kill_before_any_system_call_is_recovered(action, is_link, tmp_path):
    call = 0
    while True:
        call += 1
        root = tmp_path / str(call)
        site = make_site(root)
        if is_link:
            link_target(site)
        original = snapshot(root)
        if action == "revert":
            run.apply(site)
        is_killed = killed_at(call, root, action)
        content = (root / TARGET).read_bytes()
        assert content in (original[TARGET], original[TARGET] + block.BLOCK), "a file is never a part of either"
        if not is_killed:
            break
        assert run.status(site).state in (PatchState.CLEAN, PatchState.APPLIED, PatchState.INTERRUPTED)
        assert run.apply(site).state is PatchState.APPLIED
        assert not journal(site).exists()
        assert run.revert(site).state is PatchState.CLEAN
        assert snapshot(root) == original
    assert call > 10  # lock, journal written and synced, file written, synced and renamed, journal removed


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("name", ["replace", "fsync", "symlink", "chmod"])
def test_a_call_that_fails_leaves_every_file_whole_and_is_told(name, is_link, action, tmp_path, monkeypatch):
    """A full disk, or a directory that may not be written, at any call."""
    site = make_site(tmp_path)
    if is_link:
        link_target(site)
    clean, real, place = snapshot(tmp_path), getattr(os, name), 0
    while True:
        place += 1
        if action == "revert":
            run.apply(site)
        calls = 0

        def failing(*args, place=place, **kwargs):
            nonlocal calls
            calls += 1
            if calls == place:
                raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / TARGET))
            return real(*args, **kwargs)

        told = ""
        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing)
            try:
                getattr(run, action)(site)
            except ConfigError as error:
                told = str(error)
        if calls < place:
            break
        assert told.startswith(f"{tmp_path / TARGET} can't be read or replaced: Permission denied")
        assert (tmp_path / TARGET).read_bytes() in (clean[TARGET], clean[TARGET] + block.BLOCK)
        run.revert(site)
        assert snapshot(tmp_path) == clean


def test_a_directory_in_place_of_the_file_is_refused_by_name(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / TARGET).unlink()
    (tmp_path / TARGET).mkdir()
    assert run.status(site).state is PatchState.UNKNOWN
    with pytest.raises(ConfigError, match=rf"{TARGET} can't be read: Is a directory"):
        run.apply(site)


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_that_is_held_is_waited_for_and_its_holder_named(tmp_path, monkeypatch):
    site = make_site(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    monkeypatch.setattr(lock, "SILENCE", 0.1)
    monkeypatch.setattr(lock.log, "warning", lambda form, *args: said.append(form % args))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(site.metadata)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        try:
            with pytest.raises(ConfigError, match="holds the lock on") as caught:
                run.apply(site)
        finally:
            other.kill()
    holder = f"process {other.pid} ("
    for text in (str(caught.value), *said):
        assert holder in text or "another process" in text  # where /proc/locks does not tell
    assert len(said) == 1
    assert run.apply(site).state is PatchState.APPLIED


def test_eight_processes_apply_it_once(tmp_path):
    make_site(tmp_path)
    source = (tmp_path / TARGET).read_bytes()
    args = [sys.executable, "-m", "epfuse", "vllm", "patch", "apply", "--site", str(tmp_path)]
    ranks = [subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8
    assert sum("(changed)" in text for text in said) == 1
    assert (tmp_path / TARGET).read_bytes() == source + block.BLOCK
