"""``epfuse serve plan``."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", "plan", *arguments])


def test_six_as_json_with_and_without_epfuse() -> None:
    result = run("minimaxm3-mi300x", "--six", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert len(record["points"]) == 6
    last = record["points"][-1]
    assert last["environment"] | {"MODEL": ""} == {
        "MODEL": "", "TP": "8", "EP_SIZE": "8", "DP_ATTENTION": "false", "CONC": "256", "ISL": "8192", "OSL": "1024",
        "MAX_MODEL_LEN": "9472", "RANDOM_RANGE_RATIO": "0.8", "RESULT_FILENAME": "minimaxm3_8k1k-c256-tp8-ep8",
    }  # fmt: skip
    assert [arm["epfuse"] for arm in last["arms"]] == ["not", "plugin"]
    assert len(json.loads(run("minimaxm3-mi300x", "--json").stdout)["points"]) == 18


def test_the_table_has_points_environment_and_commands() -> None:
    result = run("minimaxm3-mi300x", "--six")
    assert result.exit_code == 0, result.output
    for words in ("minimaxm3_1k1k-c256-tp8-ep8", "candidate: VLLM_PLUGINS=epfuse", "--enable-expert-parallel", "gsm8k"):
        assert words in result.stdout


def test_arms_that_differ_in_their_arguments_alone_have_a_line_each() -> None:
    demo = resources.files("epfuse.serving") / "demos" / "vllm-cpu.yaml"
    lines = run(str(demo), "--lengths", "32_16", "--conc", "1").stdout.splitlines()
    baseline, candidate = (line.strip() for line in lines if "vllm serve" in line)
    assert baseline.startswith("tp2: vllm serve ")
    assert candidate == baseline.replace("tp2: ", "tp2-ep2: ") + " --enable-expert-parallel"


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("--conc", "16,32"), 4),
        (("--lengths", "8k1k", "--max-conc", "4"), 4),  # 1 2 4, and EP8's one at 4
        (("--evals", "only"), 2),
        (("--key", "minimaxm3-*", "--max-ep", "1", "--conc", "256"), 2),
        (("--sweep-runner", "mi300x"), 1),
    ],
)
def test_selections(arguments: tuple[str, ...], count: int) -> None:
    result = run("minimaxm3-mi300x", "--json", *arguments)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["points"]) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.yaml",), "shipped recipes are"),
        (("minimaxm3-mi300x", "--key", "x*"), "fits none of"),
        (("minimaxm3-mi300x", "--conc", "3"), "leaves no point"),
        (("minimaxm3-mi300x", "--max-conc", "0"), "leaves no point"),
        (("minimaxm3-mi300x", "--conc", "1,x"), "no list of concurrencies"),
        (("minimaxm3-mi300x", "--runner", "b200"), "runner is 'b200'"),
        (("minimaxm3-mi300x", "--six", "--conc", "1"), "exclude each other"),
        (("/dev/zero",), "has more than"),
    ],
)
def test_what_can_not_be_planned_exits_2_with_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""


def test_serve_loads_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from epfuse.cli.main import main\n"
        "main(['serve', 'plan', 'minimaxm3-mi300x', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
