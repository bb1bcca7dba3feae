from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.claim import Claim, Revoked, holder_of, revoke

KEY = "run-p1-1"
NEXT = "run-p1-2"


def test_of_many_copies_one_claims(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: Claim.take(tmp_path, KEY), range(32)))
    (holder,) = [claim for claim in claims if claim is not None]
    assert holder.held
    assert holder_of(tmp_path) == holder.holder
    assert (tmp_path / "running" / "key").read_text() == KEY
    assert [path.name for path in tmp_path.iterdir()] == ["running"]


def test_a_copy_with_the_same_key_is_no_holder(tmp_path):
    first, second = Claim.take(tmp_path, KEY), Claim.take(tmp_path, KEY)
    assert first is not None
    assert first.held
    assert second is None


def test_processes_claim_once(tmp_path):
    code = "import sys, pathlib; from epfuse.serving.claim import Claim; "
    code += f"print(Claim.take(pathlib.Path(sys.argv[1]), {KEY!r}) is not None)"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sorted(job.communicate()[0].strip() for job in jobs) == ["False", "False", "False", "True"]


def test_the_next_attempt_claims_only_after_the_revocation(tmp_path):
    claim = Claim.take(tmp_path, KEY)
    assert claim is not None
    assert Claim.take(tmp_path, NEXT) is None
    assert not revoke(tmp_path, NEXT)
    assert claim.held
    assert revoke(tmp_path, KEY)
    assert not claim.held
    assert not revoke(tmp_path, KEY)
    successor = Claim.take(tmp_path, NEXT)
    assert successor is not None
    assert successor.held
    assert not claim.held


def test_the_end_is_written_once_and_whole(tmp_path):
    claim = Claim.take(tmp_path, KEY)
    claim.publish(b"the end", tmp_path / "done.json")
    assert (tmp_path / "done.json").read_bytes() == b"the end"


@pytest.mark.parametrize("successor", [False, True])
def test_a_revoked_job_writes_no_end(tmp_path, successor):
    claim = Claim.take(tmp_path, KEY)
    revoke(tmp_path, KEY)
    follower = Claim.take(tmp_path, NEXT) if successor else None
    with pytest.raises(Revoked, match=KEY):
        claim.publish(b"mine", tmp_path / "done.json")
    assert not (tmp_path / "done.json").exists()
    if follower is not None:
        assert sorted(path.name for path in (tmp_path / "running").iterdir()) == sorted(
            ["key", "holder.json", f"end-{follower.holder.token}"]
        )
        follower.publish(b"theirs", tmp_path / "done.json")
        assert (tmp_path / "done.json").read_bytes() == b"theirs"


def test_the_end_has_its_bytes_from_the_start(tmp_path):
    """Set aside while there was room: an end is told on a full disk too."""
    claim = Claim.take(tmp_path, KEY)
    end = tmp_path / "running" / f"end-{claim.holder.token}"
    assert end.stat().st_blocks * 512 >= 1 << 18


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1, "token": "", "host": "", "pid": 1}'])
def test_a_foreign_claim_is_named(tmp_path, content):
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "holder.json").write_text(content)
    with pytest.raises(ConfigError, match="claim"):
        holder_of(tmp_path)
    with pytest.raises(ConfigError, match="claim"):
        revoke(tmp_path, KEY)


def test_a_claim_without_a_holder_is_named(tmp_path):
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "x").touch()
    with pytest.raises(ConfigError, match="remove it by hand"):
        holder_of(tmp_path)


def test_a_word_of_the_phase(tmp_path):
    claim = Claim.take(tmp_path, KEY)
    claim.note("warming")
    assert (tmp_path / "running" / "phase").read_text() == "warming"
    assert json.loads((tmp_path / "running" / "holder.json").read_text())["key"] == KEY
