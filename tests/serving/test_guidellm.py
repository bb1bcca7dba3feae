"""guidellm: what it is asked for, and a report that guidellm 0.8.1 wrote of a server that failed one request of six."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from epfuse.errors import ConfigError
from epfuse.serving.done import End
from epfuse.serving.job import run
from epfuse.serving.load import LoadFault, load_command
from epfuse.serving.load import read_result as metrics_of
from epfuse.serving.point import Client
from epfuse.serving.results import read_result
from tests.serving.points import KEY, ending, one_arm, write

REPORT = Path(__file__).parents[1] / "data" / "guidellm-0.8.1-report.json"
CLIENT = Client(tool="guidellm", prompts=6, concurrency=2, warmups=2, isl=8, osl=4, most_failed=0.2)


def asked(client: Client, model: str, result: Path) -> dict[str, Any]:
    argv = load_command(client, model, "127.0.0.1", 8888, result)
    assert argv[:3] == ("guidellm", "run", "--disable-console-interactive")
    return {name: json.loads(value) for name, value in pairwise(argv[3:]) if name.startswith("--")}


def test_it_is_asked_for_inferencex_lengths_and_a_warm_up_of_its_own(tmp_path: Path) -> None:
    client = CLIENT.model_copy(update={"isl": 1024, "osl": 8192, "prompts": 2560, "concurrency": 256, "warmups": 512})
    model = str(tmp_path / 'a, "b"=c')
    options = asked(client, model, tmp_path / "r.json")
    data = options["--data"]
    assert (data["prompt_tokens_min"], data["prompt_tokens_max"]) == (819, 1024)
    assert (data["output_tokens_min"], data["output_tokens_max"]) == (6554, 8192)
    assert options["--profile"]["streams"] == [256, 256]
    assert options["--constraint"] == {"kind": "max_requests", "count": [512, 2560]}
    assert (options["--backend"]["model"], options["--output"]["path"]) == (model, str(tmp_path / "r.json"))
    without = asked(client.model_copy(update={"warmups": 0}), "m", tmp_path / "r.json")
    assert (without["--profile"]["streams"], without["--constraint"]["count"]) == ([256], [2560])


@pytest.mark.parametrize("change", [{"request_rate": 2.0}, {"ignore_eos": False}])
def test_what_it_can_not_do_is_refused_when_the_point_is_read(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="guidellm"):
        Client.model_validate(CLIENT.model_dump() | change)


def test_numbers_are_the_requests_and_what_guidellm_makes_of_them() -> None:
    """The warm-up counts in nothing; inter-token latencies are not there, and so not made up."""
    benchmark = json.loads(REPORT.read_text())["benchmarks"][1]
    requests = benchmark["requests"]["successful"]
    found = read_result(REPORT, 2)
    assert (found.completed, found.failed) == (5, 1)
    assert found.inputs == sum(request["prompt_tokens"] for request in requests)
    assert found.outputs == sum(request["output_tokens"] for request in requests)
    assert found.duration == pytest.approx(benchmark["duration"], rel=0.1)
    means = {name: of["successful"]["mean"] for name, of in benchmark["metrics"].items()}
    assert found.ttft is not None
    assert found.ttft.mean * 1e3 == pytest.approx(means["time_to_first_token_ms"], rel=1e-9)
    assert found.tpot is not None
    tpots = [request["inter_token_latency_ms"] for request in requests]
    assert found.tpot.median * 1e3 == pytest.approx(statistics.median(tpots), rel=1e-9)
    assert found.e2el is not None
    assert found.e2el.mean == pytest.approx(means["request_latency"], rel=0.1)  # to the last token, not to the end
    assert found.itl is None
    assert metrics_of(CLIENT, REPORT)["completed"] == 5


def test_too_many_failed_requests_fail_the_load() -> None:
    with pytest.raises(LoadFault, match=r"1 of 6 requests failed, more than 5%: the first says .*Status/500"):
        metrics_of(CLIENT.model_copy(update={"most_failed": 0.05}), REPORT)


def test_tokens_in_the_steady_window_are_spread_evenly_where_nobody_knows(tmp_path: Path) -> None:
    content = json.loads(REPORT.read_text())
    model = content["benchmarks"][1]["requests"]["successful"][0]
    requests = []
    for number in range(40):  # two at a time, ten tokens a second each
        request = copy.deepcopy(model)
        start = 1000.0 + 0.5 * number
        times = {"request_start": start, "request_end": start + 1.0, "resolve_end": start + 1.0}
        times |= {"first_token_iteration": start + 0.1, "last_token_iteration": start + 1.0}
        request["info"]["timings"] |= times
        request["output_metrics"]["total_tokens"] = 10
        requests.append(request)
    content["benchmarks"][1]["requests"] = {"successful": requests, "errored": [], "incomplete": []}
    (tmp_path / "r.json").write_text(json.dumps(content))
    steady = read_result(tmp_path / "r.json", 2).steady
    assert steady is not None
    assert steady.output == pytest.approx(20, rel=0.05)


def changed(content: Any, path: tuple[Any, ...], value: object) -> Any:
    found = copy.deepcopy(content)
    at = found
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return found


FIRST = ("benchmarks", 1, "requests", "successful", 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("metadata", "version"), 3, r"metadata\.version: Input should be 2"),
        (("metadata",), [], "wrong at metadata: "),
        (("benchmarks",), [], "wrong at benchmarks: "),
        (("benchmarks",), {}, "wrong at benchmarks: Input should be a valid list"),
        (("benchmarks", 1), "x", r"wrong at benchmarks\.1: "),
        (("benchmarks", 1, "requests"), None, r"benchmarks\.1\.requests: "),
        (("benchmarks", 1, "requests", "errored"), {}, r"requests\.errored: Input should be a valid list"),
        (FIRST, 1, r"requests\.successful\.0: "),
        ((*FIRST, "info"), None, r"successful\.0\.info: "),
        ((*FIRST, "input_metrics", "total_tokens"), 0, "must say both in its usage"),
        ((*FIRST, "output_metrics", "total_tokens"), 1.5, "total_tokens: Input should be a valid integer"),
        ((*FIRST, "output_metrics", "total_tokens"), True, "total_tokens: Input should be a valid integer"),
        ((*FIRST, "info", "timings", "first_token_iteration"), None, "first_token_iteration is not there"),
        (
            (*FIRST, "info", "timings", "first_token_iteration"),
            "now",
            "iteration: Input should be a valid number",
        ),
        ((*FIRST, "info", "timings", "last_token_iteration"), 1.0, "do not follow each other"),
        ((*FIRST, "info", "timings", "request_end"), float("nan"), "request_end: Input should be"),
    ],
)
def test_a_report_that_is_not_one_is_refused_by_file_and_place(
    tmp_path: Path, path: tuple[Any, ...], value: object, words: str
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(changed(json.loads(REPORT.read_text()), path, value)))
    with pytest.raises(ConfigError, match=words) as raised:
        read_result(file, 2)
    assert "result.json" in str(raised.value)
    with pytest.raises(LoadFault, match=words):
        metrics_of(CLIENT, file)


def test_a_point_is_measured_by_it(tmp_path: Path) -> None:
    """The program is a stub that takes guidellm's options and leaves the report where it was told to."""
    tool = tmp_path / "guidellm.py"
    tool.write_text(
        "import json, pathlib, shutil, sys\n"
        "output = json.loads(sys.argv[sys.argv.index('--output') + 1])\n"
        f"shutil.copy({str(REPORT)!r}, output['path'])\n"
    )
    client = CLIENT.model_copy(update={"command": (sys.executable, str(tool))})
    point = write(tmp_path / "p1", one_arm(client=client))
    assert run(point, KEY) == 0
    done = ending(point)
    assert done.state is End.DONE
    assert done.legs[0].metrics["total_output_tokens"] == 19
    assert read_result(point.path / done.legs[0].folder / "result.json", 2).completed == 5
