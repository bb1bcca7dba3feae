"""The dispatcher against a real Slurm that is hurt: every point ends exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from epfuse.serving.dispatch import Dispatcher
from epfuse.serving.journal import PointState, read_journal
from epfuse.serving.layout import RunFolder
from tests.serving.small_runs import SIX, make_run
from tests.serving.stub_job import events
from tests.serving_slurm.cluster import Cluster
from tests.serving_slurm.dispatcher import RULES, dispatcher

DISPATCHER_KILLS, CONTROLLER_KILLS = 50, 20
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this process, and the jobs, find the cluster and the code."""
    name = "accounting_cluster" if "accounting_cluster" in request.fixturenames else "cluster"
    found: Cluster = request.getfixturevalue(name)
    source = os.pathsep.join(word for word in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if word)
    found.environment["PYTHONPATH"] = source
    for key in ("PATH", "SLURM_CONF", "PYTHONPATH"):
        monkeypatch.setenv(key, found.environment[key])


def new_run(path: Path, name: str = "t", points: tuple[str, ...] = SIX, **how: object) -> RunFolder:
    folder = make_run(path / name, points, name=name, launcher="slurm")
    (folder.path / "points" / "stub.json").write_text(json.dumps({"seconds": 0.3, **how}))
    return folder


def states(folder: RunFolder) -> dict[str, PointState]:
    return {name: change.state for name, change in read_journal(folder.journal).points.items()}


def check_ends(folder: RunFolder, attempts: bool = False) -> None:
    """Each point is done, was claimed once (each attempt's claim, where jobs died) and wrote one end."""
    assert set(states(folder).values()) == {PointState.DONE}, states(folder)
    seen = events(folder.path / "points")
    points = folder.read_run().points
    assert Counter(point for event, _, point in seen if event == "end") == dict.fromkeys(points, 1)
    claims = Counter((point, key) for event, key, point in seen if event == "claim")
    assert set(claims.values()) == {1}
    if not attempts:
        assert len(claims) == len(points)
    for name in points:
        done = folder.read_done(name)
        assert done is not None
        assert ("end", done.key, name) in seen


def keys(folder: RunFolder) -> list[str]:
    return [f"{folder.read_run().name}-{name}-1" for name in folder.read_run().points]


@contextmanager
def opened(folder: RunFolder, **slurm: object) -> Iterator[Dispatcher]:
    now = dispatcher(folder, **slurm)
    try:
        yield now
    finally:
        now.journal.__exit__(None, None, None)
        now.journal._lock.__exit__(None, None, None)


def step_until(now: Dispatcher, true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, now.journal.history.points
        now.step()
        time.sleep(RULES.poll)


def finish(now: Dispatcher, seconds: float = 120.0) -> None:
    step_until(now, lambda: now.finished, seconds)


def await_the_one_job(cluster: Cluster, key: str, state: str, seconds: float = 60.0) -> None:
    """The end that a job writes is seen before Slurm has ended the job."""
    end = time.monotonic() + seconds
    while (found := [ended for _, ended in cluster.jobs(key)]) != [state]:
        assert time.monotonic() < end, found
        time.sleep(RULES.poll)


def all_are(folder: RunFolder, *wanted: PointState) -> Callable[[], bool]:
    return lambda: set(states(folder).values()) <= set(wanted)


def test_the_six_are_submitted_once_and_done(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    with opened(folder) as now:
        finish(now)
    check_ends(folder)
    assert cluster.calls() == keys(folder)
    for key in keys(folder):
        await_the_one_job(cluster, key, "COMPLETED")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_controller_that_dies(cluster: Cluster, tmp_path: Path, number: signal.Signals, when: str) -> None:
    folder = new_run(tmp_path, seconds=2)
    with opened(folder) as now:
        if when == "before":
            cluster.hurt("slurmctld", number)
            now.step()
            assert set(states(folder).values()) == {PointState.PLANNED}
            assert not cluster.calls()  # the probe is cheap, and no key is used up
        elif when == "during":
            probe = now.launcher.probe

            def die_after_the_probe(place: str) -> str | None:
                answer = probe(place)
                cluster.hurt("slurmctld", number)
                return answer

            now.launcher.probe = die_after_the_probe  # type: ignore[method-assign]
            now.step()
            del now.launcher.probe
            assert Counter(states(folder).values()) == {PointState.UNKNOWN: 1, PointState.PLANNED: 5}
        else:
            now.step()
            assert set(states(folder).values()) == {PointState.QUEUED}
            cluster.hurt("slurmctld", number)
            step_until(now, lambda: PointState.QUEUED not in states(folder).values())
            assert PointState.PLANNED not in states(folder).values()
            assert PointState.FAILED not in states(folder).values()
        cluster.start("slurmctld")
        with cluster.operator():
            finish(now)
    check_ends(folder, attempts=when == "after" and number is signal.SIGKILL)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_controller_that_freezes(cluster: Cluster, tmp_path: Path, when: str) -> None:
    """What it was asked while frozen, it does when it wakes up: after sbatch has given up."""
    folder = new_run(tmp_path, points=SIX[:2], seconds=2)
    with opened(folder) as now:
        if when == "after":
            now.step()
        elif when == "during":
            now.launcher.probe = lambda place: None  # type: ignore[method-assign]
        cluster.hurt("slurmctld", signal.SIGSTOP)
        now.step()
        if when == "during":
            del now.launcher.probe
            assert sorted(states(folder).values()) == [PointState.PLANNED, PointState.UNKNOWN]
        now.step()
        cluster.hurt("slurmctld", signal.SIGCONT)
        finish(now)
    check_ends(folder)
    for key in keys(folder):
        assert len(cluster.jobs(key)) == 1


def test_munge_that_is_down_is_a_doubt(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path, points=SIX[:2])
    with opened(folder) as now:
        now.launcher.probe = lambda place: None  # type: ignore[method-assign]
        cluster.hurt("munged", signal.SIGTERM)
        now.step()
        assert sorted(states(folder).values()) == [PointState.PLANNED, PointState.UNKNOWN]
        assert "authentication" in read_journal(folder.journal).points[SIX[0]].why
        cluster.start("munged")
        del now.launcher.probe
        finish(now)
    check_ends(folder)


def test_a_node_whose_slurmd_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm calls the job NODE_FAIL; its process runs on, and its end is the point's: nothing is measured twice."""
    folder = new_run(tmp_path, points=SIX[:1], seconds=4)
    with opened(folder) as now:
        step_until(now, all_are(folder, PointState.RUNNING))
        cluster.hurt("slurmd", signal.SIGKILL)
        finish(now)
    check_ends(folder)


def test_a_node_that_is_lost_with_its_job_gets_another_attempt(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path, points=SIX[:1], die=[SIX[0]])
    with opened(folder) as now:
        finish(now)
    assert set(states(folder).values()) == {PointState.DONE}
    seen = [(event, key) for event, key, _ in events(folder.path / "points")]
    first, second = f"t-{SIX[0]}-1", f"t-{SIX[0]}-2"
    assert seen == [("start", first), ("claim", first), ("start", second), ("claim", second), ("end", second)]
    notes = [change for change in folder.journal.read_text().splitlines() if "its log ends" in change]
    assert "killed by the test" in notes[0]


def test_a_job_that_ends_while_the_controller_is_away_is_done(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path, points=SIX[:1], seconds=2)
    with opened(folder) as now:
        step_until(now, all_are(folder, PointState.RUNNING))
        cluster.hurt("slurmctld", signal.SIGKILL)
        finish(now)
    check_ends(folder)
    assert not cluster.up()


def test_a_number_that_is_given_twice_confuses_nobody(cluster: Cluster, tmp_path: Path) -> None:
    """A controller killed right after its answer forgets the job and gives its number to somebody else's."""
    folder = new_run(tmp_path, points=SIX[:1])
    (cluster.folder / "state-before").mkdir()
    cluster.hurt("slurmctld", signal.SIGTERM)
    subprocess.run(["cp", "-a", f"{cluster.folder}/state/.", f"{cluster.folder}/state-before"], check=True)
    cluster.start("slurmctld")
    cluster.ask("scontrol", "update", "nodename=localhost", "state=drain", "reason=test")
    with opened(folder) as now:
        now.step()
        number = read_journal(folder.journal).points[SIX[0]].job
        cluster.hurt("slurmctld", signal.SIGKILL)
        subprocess.run(["rm", "-rf", f"{cluster.folder}/state"], check=True)
        subprocess.run(["mv", f"{cluster.folder}/state-before", f"{cluster.folder}/state"], check=True)
        cluster.start("slurmctld")
        other = cluster.ask("sbatch", "--parsable", "-J", "other", "-o", "/dev/null", "--wrap", "sleep 300").strip()
        assert other == number
        cluster.ask("scontrol", "update", "nodename=localhost", "state=resume")
        finish(now)
    check_ends(folder)
    assert [job for job, _ in cluster.jobs("other")] == [number]
    assert cluster.jobs("other")[0][1] in ("RUNNING", "PENDING")  # it was not ours to end


def test_an_sbatch_that_fails_late_and_has_submitted(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    (cluster.folder / "sbatch.how").write_text("late")
    with opened(folder) as now:
        finish(now)
    check_ends(folder)
    assert cluster.calls() == keys(folder)


def test_a_queue_that_never_ends_is_given_up_and_a_cancel_is_verified(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path, points=SIX[:1], seconds=60)
    with opened(folder, partition="small", arguments=("--time=5",)) as now:
        finish(now)
    change = read_journal(folder.journal).points[SIX[0]]
    assert change.state is PointState.FAILED
    assert "PartitionTimeLimit" in change.why
    await_the_one_job(cluster, f"t-{SIX[0]}-1", "CANCELLED")
    other = new_run(tmp_path, "u", points=SIX[:1], seconds=60)
    with opened(other) as now:
        step_until(now, all_are(other, PointState.RUNNING))
        other.point(SIX[0]).cancel.touch()
        assert now.end_points(SIX[:1]) == ""
    assert states(other) == {SIX[0]: PointState.CANCELLED}
    await_the_one_job(cluster, f"u-{SIX[0]}-1", "CANCELLED")


def test_what_slurm_refuses_for_good_fails_at_once(cluster: Cluster, tmp_path: Path) -> None:
    folder = new_run(tmp_path, points=SIX[:1])
    with opened(folder, partition="nowhere") as now:
        finish(now)
    change = read_journal(folder.journal).points[SIX[0]]
    assert change.state is PointState.FAILED
    assert "Invalid partition name specified" in change.why


def test_with_accounting_a_lost_job_is_not_waited_for(accounting_cluster: Cluster, tmp_path: Path) -> None:
    """Slurmdbd remembers a job that the controller lost as PENDING, for ever."""
    cluster = accounting_cluster
    folder = new_run(tmp_path)
    with opened(folder) as now:
        now.step()
        assert set(states(folder).values()) == {PointState.QUEUED}
        cluster.restart("slurmctld")
        with cluster.operator():
            finish(now)
    check_ends(folder, attempts=True)
    # numbers that were given twice have one row
    listed = set(cluster.ask("sacct", "-n", "-P", "-X", "-S", "1970-01-01", "-o", "JobName").split())
    assert listed & set(keys(folder))


def test_with_accounting_a_dead_database_is_no_look(accounting_cluster: Cluster, tmp_path: Path) -> None:
    cluster = accounting_cluster
    folder = new_run(tmp_path, points=SIX[:1], seconds=3)
    with opened(folder) as now:
        step_until(now, all_are(folder, PointState.QUEUED, PointState.RUNNING, PointState.STARTING))
        cluster.hurt("slurmdbd", signal.SIGKILL)
        finish(now)
    check_ends(folder)


def start(folder: RunFolder) -> subprocess.Popen[bytes]:
    with (folder.path / "dispatcher.log").open("ab") as log:
        argv = [sys.executable, "-m", "tests.serving_slurm.dispatcher", str(folder.path)]
        return subprocess.Popen(argv, cwd=REPOSITORY, stdout=log, stderr=log)


def test_seeded_kills_of_the_dispatcher(cluster: Cluster, tmp_path: Path, share: float) -> None:
    chance = random.Random(23)
    wanted = round(DISPATCHER_KILLS * share)
    kills, number = 0, 0
    while kills < wanted:
        number += 1
        folder = new_run(tmp_path, f"r{number}", seconds=chance.uniform(0.1, 1.0))
        for _ in range(min(10, wanted - kills)):
            process = start(folder)
            try:
                process.wait(chance.uniform(0.6, 2.5))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        process = start(folder)
        try:
            assert process.wait(120) == 0, (folder.path / "dispatcher.log").read_text()
        finally:
            process.kill()
        check_ends(folder)
        for key in keys(folder):
            assert len(cluster.jobs(key)) == 1, key
    assert sorted(set(cluster.calls())) == sorted(f"r{run + 1}-{name}-1" for run in range(number) for name in SIX)


def test_seeded_kills_of_the_controller(cluster: Cluster, tmp_path: Path, share: float) -> None:
    chance = random.Random(24)
    wanted = max(1, round(CONTROLLER_KILLS * share))
    kills, number = 0, 0
    while kills < wanted:
        number += 1
        folder = new_run(tmp_path, f"r{number}", seconds=chance.uniform(0.1, 1.0))
        process = start(folder)
        try:
            with cluster.operator():
                for _ in range(min(4, wanted - kills)):
                    time.sleep(chance.uniform(0.4, 2.0))
                    if process.poll() is not None:
                        break
                    cluster.hurt("slurmctld", chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                    time.sleep(chance.uniform(0.0, 1.5))
                    cluster.start("slurmctld")
                    kills += 1
                assert process.wait(150) == 0, (folder.path / "dispatcher.log").read_text()
        finally:
            process.kill()
            process.wait()
        check_ends(folder, attempts=True)
