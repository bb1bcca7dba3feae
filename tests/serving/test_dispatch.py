"""The dispatcher against a simulated batch system: whatever fails, each point ends exactly once."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from epfuse.serving import journal as journal_module
from epfuse.serving.claim import Claim, holder_of, revoke
from epfuse.serving.contact import WallClock
from epfuse.serving.dispatch import Dispatcher
from epfuse.serving.done import End
from epfuse.serving.journal import ENDS, Journal, PointState, read_journal
from epfuse.serving.launchers.launcher import JobPhase, Rejected, Unsure
from epfuse.serving.layout import RunFolder
from epfuse.serving.lock import RunLock
from epfuse.serving.patience import Rules
from tests.serving.seeds import seeds
from tests.serving.simulation import Killed, World
from tests.serving.small_runs import SIX, make_run

RULES = Rules(poll=5.0, attempts=50, losses=50, outage=1e9, identical=10**9)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, and there are thousands of writes."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def dispatcher(folder: RunFolder, world: World, rules: Rules = RULES) -> Dispatcher:
    lock = RunLock(folder.lock)
    try:
        journal = Journal(folder.journal, lock)
    except Killed:  # while it cut a torn line
        os.close(lock._file)
        raise
    return Dispatcher(folder, folder.read_run(), journal, world, ("job",), rules, clock=world)


def kill(dispatcher: Dispatcher) -> None:
    """What the kernel does for a process that is gone; its lock's file keeps its words."""
    os.close(dispatcher.journal._file)
    os.close(dispatcher.journal._lock._file)


def run_to_end(folder: RunFolder, world: World, rules: Rules = RULES) -> int:
    """Dispatch, again after each kill; how many kills there were."""
    for kills in range(2000):
        with suppress(Killed):
            now = dispatcher(folder, world, rules)
            try:
                now.dispatch()
                return kills
            finally:
                kill(now)
    raise AssertionError("it does not come to an end")


def states(folder: RunFolder) -> dict[str, PointState]:
    return {name: change.state for name, change in read_journal(folder.journal).points.items()}


@pytest.mark.parametrize("seed", seeds(10, 200))
def test_every_point_ends_exactly_once_whatever_fails(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    folder = make_run(tmp_path)
    world = World(
        seed,
        tmp_path / "points",
        kills=chance.choice([0.0, 0.05, 0.2]),
        refusals=chance.choice([0.0, 0.3]),
        outages=chance.choice([0.0, 1.0]),
        losses=chance.choice([0.0, 0.2]),
        deaths=chance.choice([0.0, 0.2]),
        copies=chance.choice([0.0, 0.5]),
        ghosts=chance.choice([0.0, 0.2]),
    )
    whole = journal_module._write

    def killed_while_writing(file: int, line: bytes) -> None:
        """Before, in the middle of, or after a line."""
        if world.chance.random() < world.kills / 4:
            whole(file, line[: world.chance.choice([0, len(line) // 2, len(line)])])
            raise Killed
        whole(file, line)

    monkeypatch.setattr(journal_module, "_write", killed_while_writing)
    run_to_end(folder, world)
    world.kills = 0.0
    world.sleep(250.0)  # what is on its way arrives after the end
    assert set(states(folder).values()) == {PointState.DONE}
    assert world.ends == dict.fromkeys(SIX, 1)
    assert not world.overlaps
    if not world.deaths and not world.ghosts:
        assert world.starts == dict.fromkeys(SIX, 1)
        if not world.refusals and not world.outages and not world.losses:
            assert set(world.orders.values()) == {1}


@pytest.mark.parametrize("seed", seeds(3, 40))
def test_of_copies_that_start_at_the_same_time_one_runs(tmp_path: Path, seed: int) -> None:
    """No singleton holds them apart: the claim alone does."""
    folder = make_run(tmp_path)
    world = World(seed, tmp_path / "points", kills=0.05, copies=1.0)
    run_to_end(folder, world)
    world.kills = 0.0
    world.sleep(100.0)
    assert len(world.jobs) >= 12
    assert world.starts == world.ends == dict.fromkeys(SIX, 1)
    assert set(states(folder).values()) == {PointState.DONE}


def test_without_a_claim_copies_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation notices what the claim is for."""

    def take_from_whoever_holds_it(point: Path, key: str) -> Claim | None:
        if (holder := holder_of(point)) is not None:
            revoke(point, holder.key)
        return taken(point, key)

    taken = Claim.take
    monkeypatch.setattr(Claim, "take", take_from_whoever_holds_it)
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points", copies=1.0)
    run_to_end(folder, world)
    assert max(world.starts.values()) > 1


@pytest.mark.parametrize("seed", seeds(3, 40))
def test_a_process_that_runs_on_after_its_node_was_given_up_counts_for_nothing(tmp_path: Path, seed: int) -> None:
    """NODE_FAIL: the next attempt starts after the first one's claim was taken away, so one end is left."""
    folder = make_run(tmp_path)
    world = World(seed, tmp_path / "points", ghosts=0.8)
    run_to_end(folder, world)
    world.sleep(250.0)
    assert sum(world.starts.values()) > len(SIX)
    assert world.ends == dict.fromkeys(SIX, 1)
    assert set(world.began.values()) == {1}
    assert not world.overlaps


@pytest.mark.parametrize("seed", seeds(3, 40))
def test_killed_dispatchers_submit_no_key_twice_that_was_accepted(tmp_path: Path, seed: int) -> None:
    folder = make_run(tmp_path)
    world = World(seed, tmp_path / "points", kills=0.15, refusals=0.3)
    run_to_end(folder, world)
    numbers: dict[str, list[int]] = {}
    for job in world.jobs:
        numbers.setdefault(job.key, []).append(job.number)
    assert {key: len(found) for key, found in numbers.items()} == {f"t-{name}-1": 1 for name in SIX}


def test_an_order_without_an_answer_is_unknown_until_two_looks_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", refusals=1.0)
    world.late = 0.0
    world.chance = _Never()  # type: ignore[assignment]
    world.refusals = 2.0
    now = dispatcher(folder, world)
    now.step()
    assert states(folder) == {"a": PointState.UNKNOWN}
    world.refusals = 0.0
    asked = []
    for _ in range(8):
        now.step()
        asked.append((world.time, states(folder)["a"], world.orders["t-a-1"]))
        world.sleep(5.0)
    kill(now)
    first, again = asked[0][0], next(at for at, _, orders in asked if orders == 2)
    assert again - first > world.patience()
    assert [state for at, state, _ in asked if at < again] == [PointState.UNKNOWN] * (
        len([a for a in asked if a[0] < again])
    )


class _Never(random.Random):
    def random(self) -> float:
        return 0.999999


def test_a_controller_that_is_away_makes_points_unknown_and_never_absent(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a", "b"])
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world)
    now.step()
    assert set(states(folder).values()) == {PointState.QUEUED}
    world.down_until = world.time + 3600
    for _ in range(100):
        world.sleep(5.0)
        now.step()
    assert set(states(folder).values()) == {PointState.UNKNOWN}
    assert world.orders == {"t-a-1": 1, "t-b-1": 1}
    world.down_until = 0.0
    world.sleep(400)
    now.step()
    assert set(states(folder).values()) == {PointState.QUEUED}
    kill(now)


def test_nothing_is_submitted_while_the_probe_fails(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", down_until=1e6)
    now = dispatcher(folder, world)
    for _ in range(50):
        now.step()
        world.sleep(5.0)
    kill(now)
    assert states(folder) == {"a": PointState.PLANNED}
    assert not world.orders


def test_a_long_outage_ends_the_dispatcher_and_a_later_one_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points", down_until=1000.0 + 7000)
    now = dispatcher(folder, world, Rules(poll=60, outage=3600))
    now.dispatch()
    assert "6 of 6 points have not ended: slurm has not answered for 3600 s" in now.unfinished
    kill(now)
    world.down_until = 0.0
    run_to_end(folder, world)
    assert set(states(folder).values()) == {PointState.DONE}


def test_a_job_that_ended_while_the_controller_was_away_is_done(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world)
    now.step()
    world.down_until = 1e9
    world.stuck = False
    world.sleep(200)
    now.step()
    kill(now)
    assert states(folder) == {"a": PointState.DONE}


def test_a_queue_that_never_ends_has_a_deadline(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True, pending_why="PartitionConfig")
    now = dispatcher(folder, world, Rules(hopeless=300))
    now.dispatch()
    kill(now)
    change = read_journal(folder.journal).points["a"]
    assert change.state is PointState.FAILED
    assert change.why == "it was PENDING for 300 s because of PartitionConfig"
    assert [job.word for job in world.jobs] == ["CANCELLED"]


def test_a_queue_that_ends_has_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True, pending_why="Resources")
    now = dispatcher(folder, world, Rules(hopeless=300))
    for _ in range(200):
        now.step()
        world.sleep(5.0)
    kill(now)
    assert states(folder) == {"a": PointState.QUEUED}


def test_a_canary_ends_well_before_the_others_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path, canary="8k1k-c1")
    world = World(0, tmp_path / "points")
    now = dispatcher(folder, world)
    while states(folder)["8k1k-c1"] is not PointState.DONE:
        assert set(world.orders) <= {"t-8k1k-c1-1"}
        now.step()
        world.sleep(5.0)
    kill(now)
    run_to_end(folder, world)
    assert set(states(folder).values()) == {PointState.DONE}


def test_a_canary_that_fails_keeps_the_others_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, canary="1k1k-c1")
    world = World(0, tmp_path / "points")
    monkeypatch.setattr(World, "end", _ending(lambda job: (End.FAILED, "the server died")))
    now = dispatcher(folder, world)
    now.dispatch()
    kill(now)
    assert sorted(states(folder).values()) == [PointState.FAILED, *[PointState.PLANNED] * 5]
    assert now.unfinished == "5 of 6 points have not ended: the first point, 1k1k-c1, is failed"


def _ending(how):  # type: ignore[no-untyped-def]
    original = World.end
    return lambda world, job: original(world, job, *how(job))


def test_identical_failures_open_the_breaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points")
    monkeypatch.setattr(World, "places", property(lambda world: {"slurm": 1}))
    monkeypatch.setattr(World, "end", _ending(lambda job: (End.FAILED, f"port 80{job.number} is taken")))
    now = dispatcher(folder, world, Rules(identical=3))
    now.dispatch()
    kill(now)
    assert sorted(states(folder).values()) == [*[PointState.FAILED] * 3, *[PointState.PLANNED] * 3]
    assert "3 times the same failure, so nothing more is submitted: port 803 is taken" in now.unfinished


def test_addresses_make_no_failure_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points")
    monkeypatch.setattr(World, "places", property(lambda world: {"slurm": 1}))
    how = _ending(lambda job: (End.FAILED, f"fault by GPU node-2 on address 0x7f{'abcdef'[job.number - 1]}00"))
    monkeypatch.setattr(World, "end", how)
    now = dispatcher(folder, world, Rules(identical=3))
    now.dispatch()
    kill(now)
    assert "3 times the same failure" in now.unfinished


def test_failures_of_different_kinds_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points")
    monkeypatch.setattr(World, "end", _ending(lambda job: (End.FAILED, f"fault {'abcdef'[job.number - 1]}")))
    now = dispatcher(folder, world, Rules(identical=2))
    now.dispatch()
    kill(now)
    assert set(states(folder).values()) == {PointState.FAILED}


def test_a_final_refusal_fails_the_point_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points")
    monkeypatch.setattr(World, "submit", lambda world, order, place: Rejected("Invalid partition name specified"))
    now = dispatcher(folder, world)
    now.dispatch()
    kill(now)
    change = read_journal(folder.journal).points["a"]
    assert (change.state, change.why) == (PointState.FAILED, "Invalid partition name specified")


def test_fast_refusals_burn_no_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that shows its queue and refuses jobs for an hour is asked a few times, each later than the last."""
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points")
    accept = World.submit

    def refuse(world: World, order, place: str):  # type: ignore[no-untyped-def]
        if world.time < 4600:
            world.orders[order.key] += 1
            return Unsure("Slurm temporarily unable to accept job, sleeping and retrying")
        return accept(world, order, place)

    monkeypatch.setattr(World, "submit", refuse)
    run_to_end(folder, world)
    assert states(folder) == {"a": PointState.DONE}
    assert world.orders["t-a-1"] <= 30


@pytest.mark.parametrize("away", [False, True])
def test_a_cancel_is_asked_until_a_look_shows_its_effect(tmp_path: Path, away: bool) -> None:
    folder = make_run(tmp_path, ["a", "b"])
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world)
    now.step()
    folder.point("a").cancel.touch()
    if away:
        world.down_until = world.time + 500
        for _ in range(20):
            now.step()
            world.sleep(5.0)
        assert states(folder)["a"] is PointState.UNKNOWN
    for _ in range(200):
        now.step()
        world.sleep(5.0)
    kill(now)
    assert states(folder) == {"a": PointState.CANCELLED, "b": PointState.QUEUED}
    assert [job.word for job in world.jobs] == ["CANCELLED", "PENDING"]


def test_a_cancel_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are answered all the time: a controller that shows its queue may still refuse a cancel."""
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True)
    cancel, asked = World.cancel, []

    def refuse(world: World, place: str, key: str) -> str | None:
        asked.append(world.time)
        return cancel(world, place, key) if len(asked) > 5 else "scancel: error: Transport endpoint is not connected"

    monkeypatch.setattr(World, "cancel", refuse)
    now = dispatcher(folder, world)
    now.step()
    folder.point("a").cancel.touch()
    while states(folder)["a"] is not PointState.CANCELLED:
        world.sleep(5.0)
        now.step()
        assert world.time < 3000
    kill(now)
    assert len(asked) == 6
    pauses = [later - sooner for sooner, later in pairwise(asked)]
    assert pauses[-1] >= 40 > pauses[0]  # each later than the last
    texts = [note.text for note in read_journal(folder.journal).notes]
    assert len(texts) == 2, texts
    assert "asked to end a job, does not answer: scancel: error" in texts[0]
    assert "answers again" in texts[1]


def test_a_cancel_without_an_effect_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scancel` of what the controller does not know yet is silent, and says 0."""
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True)
    cancel, asked = World.cancel, []

    def forget(world: World, place: str, key: str) -> str | None:
        asked.append(world.time)
        return cancel(world, place, key) if len(asked) > 2 else None

    monkeypatch.setattr(World, "cancel", forget)
    now = dispatcher(folder, world)
    now.step()
    folder.point("a").cancel.touch()
    while states(folder)["a"] is not PointState.CANCELLED:
        world.sleep(5.0)
        now.step()
        assert world.time < 3000
    kill(now)
    assert [round(later - sooner) for sooner, later in pairwise(asked)] == [30, 30]


def test_a_point_that_is_cancelled_before_it_began_is_never_submitted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points")
    folder.point("a").cancel.touch()
    now = dispatcher(folder, world)
    now.dispatch()
    kill(now)
    assert states(folder) == {"a": PointState.CANCELLED}
    assert not world.orders


def test_a_job_that_dies_gets_another_attempt_after_its_claim_was_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points")
    world.deaths = 2.0
    now = dispatcher(folder, world, Rules(attempts=3, identical=9))
    now.dispatch()
    kill(now)
    change = read_journal(folder.journal).points["a"]
    assert change.state is PointState.FAILED
    assert change.attempt == 3
    assert change.why == "attempt 3 ended as NODE_FAIL without a result"
    assert world.starts == {"a": 3}  # each one could claim
    assert [job.key for job in world.jobs] == ["t-a-1", "t-a-2", "t-a-3"]


def test_jobs_that_are_taken_away_before_they_begin_are_no_failures(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world, Rules(attempts=1, losses=3, identical=2))
    for _ in range(3):
        while not any(job.phase is JobPhase.WAITING for job in world.jobs):
            now.step()
            world.sleep(5.0)
        for job in world.jobs:
            job.phase, job.word = JobPhase.ENDED, "CANCELLED"
    world.stuck = False
    now.dispatch()
    kill(now)
    assert set(states(folder).values()) == {PointState.DONE}


def test_a_copy_that_comes_late_is_seen_and_does_not_run(tmp_path: Path) -> None:
    """What a frozen controller had in its hands longer than anyone waits: two jobs, one claim, one end."""
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world)
    now.step()
    first = world.jobs.pop()
    for _ in range(10):
        world.sleep(5.0)
        now.step()
    assert world.orders == {"t-a-1": 2}
    world.jobs.append(first)
    now.step()
    assert read_journal(folder.journal).notes[-1].text.startswith("a has 2 jobs (2, 1)")
    world.stuck = False
    now.dispatch()
    kill(now)
    world.sleep(300)
    assert world.starts == world.ends == {"a": 1}
    assert states(folder) == {"a": PointState.DONE}


def test_a_point_whose_end_is_damaged_fails_and_the_others_go_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a", "b"])
    world = World(0, tmp_path / "points")
    folder.point("a").done.write_text("{}")
    now = dispatcher(folder, world)
    now.dispatch()
    kill(now)
    assert states(folder) == {"a": PointState.FAILED, "b": PointState.DONE}


def test_a_folder_with_spaces_is_told_of_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "two  spaces", ["a"])
    folder.point("a").running.mkdir()
    now = dispatcher(folder, World(0, folder.path / "points"))
    now.step()
    notes = len(now.journal.history.notes)
    for _ in range(5):
        now.step()
    assert len(now.journal.history.notes) == notes == 1
    kill(now)


def test_a_clock_that_is_set_moves_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two looks would seem as far apart as a late sbatch needs, or a pause last until the clock is right again."""
    clock = WallClock()
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert 0 <= clock.now() - before < 600


def test_a_step_without_news_writes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    world = World(0, tmp_path / "points", stuck=True)
    now = dispatcher(folder, world)
    now.step()
    now.step()
    size = folder.journal.stat().st_size
    for _ in range(20):
        world.sleep(5.0)
        now.step()
    assert folder.journal.stat().st_size == size
    kill(now)


def test_a_full_disk_stops_the_dispatcher_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points")
    now = dispatcher(folder, world)
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        now.dispatch()
    monkeypatch.setattr(os, "write", write)
    kill(now)
    assert not world.orders  # the journal comes before the deed
    assert read_journal(folder.journal).torn == 0
    run_to_end(folder, world)
    assert set(states(folder).values()) <= ENDS


def test_a_launcher_that_loses_what_it_takes_is_not_fed_for_ever(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["a"])
    world = World(0, tmp_path / "points", losses=2.0)
    now = dispatcher(folder, world, Rules(losses=3))
    now.dispatch()
    kill(now)
    assert read_journal(folder.journal).points["a"].why.startswith("it was taken 3 times")
    assert world.orders == {"t-a-1": 3}
