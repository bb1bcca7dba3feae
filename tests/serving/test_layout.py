"""The contract between dispatcher, job and report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.done import Done, End
from epfuse.serving.layout import RunFolder, attempt_of, make_key, write_model
from epfuse.serving.point import Arm, Client, Command, Point, PointJob, Run

POINT = Point(
    name="m3_1k1k-c4",
    model="m3",
    prefix="m3",
    target="mi300x",
    precision="fp8",
    isl=1024,
    osl=1024,
    concurrency=4,
    tp=8,
)
JOB = PointJob(
    run="first",
    point=POINT,
    arms=(Arm(name="baseline", server=Command(argv=("vllm", "serve", "m3"), env={"A": "1"})),),
    order=("baseline",),
    client=Client(prompts=40, concurrency=4, warmups=8, isl=1024, osl=1024),
    gpus=8,
    gpu_vendor="amd",
)
RUN = Run(name="first", recipe="x.yaml", recipe_sha256="0" * 64, epfuse="0.1.0", created=1.0, points=("m3_1k1k-c4",))


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RUN, [JOB])
    assert folder.read_run() == RUN
    assert folder.read_job(POINT.name) == JOB
    assert folder.read_done(POINT.name) is None
    key = make_key("first", POINT.name, 2)
    done = Done(name=POINT.name, key=key, state=End.DONE, started=1.0, ended=2.0)
    write_model(folder.point(POINT.name).done, done)
    assert folder.read_done(POINT.name) == done
    assert attempt_of(key, "first", POINT.name) == 2
    with pytest.raises(ConfigError, match="has a run already"):
        folder.create(RUN, [JOB])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"isl": 1024', '"isl": "1024"', 1),
        lambda text: text.replace('"isl": 1024', '"isl": 1024, "extra": 1', 1),
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"baseline"', '"other"', 1),
        lambda text: text.replace("m3_1k1k-c4", "../../up", 1),
        lambda text: "[]",
    ],
)
def test_a_job_that_is_torn_or_foreign_is_refused_by_its_file(tmp_path: Path, spoil) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RUN, [JOB])
    file = folder.point(POINT.name).job
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ConfigError, match=r"point\.json"):
        folder.read_job(POINT.name)


def test_a_file_of_another_point_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RUN, [JOB])
    other = JOB.model_copy(update={"point": POINT.model_copy(update={"name": "m3_8k1k-c4"})})
    write_model(folder.point(POINT.name).job, other)
    end = Done(name="m3_8k1k-c4", key="first-m3_8k1k-c4-1", state=End.DONE, started=1.0, ended=2.0)
    write_model(folder.point(POINT.name).done, end)
    for read in (folder.read_job, folder.read_done):
        with pytest.raises(ConfigError, match="of point 'm3_8k1k-c4', in the folder of 'm3_1k1k-c4'"):
            read(POINT.name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a b", "a\n", "a" * 81])
def test_names_are_fit_for_files_and_slurm(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Point.model_validate(POINT.model_dump() | {"name": name})


def test_a_key_of_another_point_is_refused() -> None:
    for key in ("first-m3_1k1k-c16-1", "first-m3_1k1k-c4-0", "first-m3_1k1k-c4-1x", "first-m3_1k1k-c4"):
        with pytest.raises(ConfigError, match="key is"):
            attempt_of(key, "first", POINT.name)


def test_lengths_are_drawn_by_vllm_from_the_range_of_inferencex() -> None:
    assert JOB.client.vllm_lengths(1024) == (921, 0.1111)
    assert JOB.client.vllm_lengths(8192) == (7372, 0.1111)


def test_the_files_are_json_for_anyone(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(RUN, [JOB])
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == 1
    assert json.loads((tmp_path / "points/m3_1k1k-c4/point.json").read_text())["point"]["concurrency"] == 4


def test_serving_imports_nothing_of_the_kernels() -> None:
    program = """
import importlib, pkgutil, sys
import epfuse.serving
for module in pkgutil.walk_packages(epfuse.serving.__path__, "epfuse.serving."):
    importlib.import_module(module.name)
kernels = ("torch", "triton", "transformers", "vllm", "epfuse.api", "epfuse.families", "epfuse.stages", "epfuse.policy")
print([name for name in sys.modules if name in kernels or name.startswith(tuple(k + "." for k in kernels))])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
