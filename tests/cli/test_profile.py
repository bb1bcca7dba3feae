"""``epfuse profile``: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main
from epfuse.cli.profile import SHAPE_NAMES, WEIGHT_FORMATS
from epfuse.profiling.shapes import SHAPES, WEIGHT_BYTES
from tests.profiling.traces import MI300X, TraceFile, server_step

GEMM = "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    made = TraceFile()
    end = server_step(made, "execute_context_0(0)_generation_8(8)", 100)
    server_step(made, "execute_context_0(0)_generation_9(9)", end + 100)
    return made.write(tmp_path / "server.json.gz")


def test_choices_are_those_of_the_modules() -> None:
    assert list(SHAPES) == SHAPE_NAMES
    assert list(WEIGHT_BYTES) == WEIGHT_FORMATS


def test_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "epfuse profile rank0.pt.trace.json.gz" in result.stdout


def test_table() -> None:
    result = run(MI300X, "--shape", "gpt-oss-20b")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["expert", "GEMM", "1", "24", "3272.7", "30.7", "136.4", f"{GEMM}_swiglu"] in rows
    assert ["all", "kernels", "425", "10674.5", "100.0"] in rows
    assert "24 layers (found by repetition): p50 432.3 us, p95 467.4 us" in result.stdout
    assert "predicted: if these experts were w8a16 (MXFP8 weights, BF16 activations): " in result.stdout
    assert result.stderr == ""


def test_json() -> None:
    result = run(MI300X, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["kernels_total"] == 425
    assert record["unclassified"] == []
    assert record["experts"] is None
    assert sum(phase["calls"] for phase in record["phases"]) == 425
    assert sum(phase["us"] for phase in record["phases"]) == pytest.approx(record["time"]["kernel_sum_us"])
    gemm = next(phase for phase in record["phases"] if phase["name"] == "expert GEMM 2")
    assert {"name", "calls", "us", "kernels"} <= set(gemm)
    assert gemm["kernels"][0] == {
        "name": GEMM,
        "calls": 24,
        "us": gemm["us"],
        "rule": "triton_kernels",
    }


def test_the_progress_bar_leaves_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = run(MI300X, "--json")
    monkeypatch.setattr("epfuse.report.late_bar.PATIENCE", -1.0)
    result = run(MI300X, "--json")
    assert (result.exit_code, result.stdout) == (0, quiet.stdout)


def test_several_traces(trace: Path) -> None:
    result = run(trace, MI300X, "--json")
    assert [one["kernels_total"] for one in json.loads(result.stdout)["profiles"]] == [70, 425]


def test_window(trace: Path) -> None:
    for window, tokens in (("0", [8]), ("1", [9]), ("0..1", [8, 9])):
        record = json.loads(run(trace, "--json", "--window", window, "--shape", "minimax-m3-ep8").stdout)
        assert record["experts"]["tokens"] == tokens


def test_compare(trace: Path) -> None:
    result = run("--compare", trace, MI300X)
    assert result.exit_code == 0, result.output
    assert "B - A us" in result.stdout
    record = json.loads(run("--compare", trace, trace, "--json").stdout)
    assert set(record) == {"compare", "a", "b"}
    assert {row["difference_us"] for row in record["compare"]} == {0}


def test_html(tmp_path: Path) -> None:
    page = tmp_path / "profile.html"
    result = run(MI300X, "--html", page)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"written: {page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_svg(tmp_path: Path) -> None:
    picture = tmp_path / "layer.svg"
    assert run(MI300X, "--svg", picture).exit_code == 0
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<svg ")
    made = TraceFile()
    made.kernel("gate_up_kernel", 0, 5)
    result = run(made.write(tmp_path / "one.json"), "--svg", picture)
    assert result.exit_code == 2
    assert "has no layers that repeat" in result.stderr


def test_config_and_map(tmp_path: Path, trace: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rules.yaml").write_text(
        "schema: 1\nname: mine\nrules: [{phase: sparse index, kernel: rotary_embedding}]\n"
    )
    options = ["--config", tmp_path / "config.json", "--ep-size", "2", "--weights", "mxfp8", "--tokens", "5"]
    result = run(trace, *options, "--map", tmp_path / "rules.yaml", "--json")
    record = json.loads(result.stdout)
    assert record["experts"]["shape"]["local_experts"] == 4
    assert (record["experts"]["weights"], record["experts"]["tokens"]) == ("mxfp8", [5])
    assert "sparse index" in [phase["name"] for phase in record["phases"]]


def test_nothing_recognised_exits_1(tmp_path: Path) -> None:
    made = TraceFile()
    made.kernel("strange", 0, 5)
    made.kernel("stranger", 10, 7)
    result = run(made.write(tmp_path / "strange.json"))
    assert result.exit_code == 1
    assert "unclassified: 1 x, 7.0 us: stranger" in result.stdout
    assert "no kernel of" in result.stderr


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    made = TraceFile()
    made.kernel("[red]x[/nonsense]\x1b[31m", 0, 5)
    made.kernel("gate_up_kernel", 10, 5)
    result = run(made.write(tmp_path / "[bold]odd.json"))
    assert result.exit_code == 0, result.output
    assert "[red]x[/nonsense]\ufffd[31m" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'TRACE...'"),
        (["gone.json"], "epfuse: gone.json can't be read: No such file"),
        ([MI300X, "--window", "7"], "epfuse: window is '7'; device 2 has the steps 0..0"),
        ([MI300X, "--compare"], "--compare takes two traces, not 1"),
        ([MI300X, "--map", "gone.yaml"], "epfuse: rules gone.yaml can't be read"),
        ([MI300X, "--config", "gone.json"], "epfuse: config gone.json can't be read"),
        ([MI300X, "--shape", "gpt-oss-20b", "--config", "c.json"], "exclude each other"),
        ([MI300X, "--ep-size", "8"], "belong to --config"),
        ([MI300X, "--shape", "llama"], "'llama' is not one of"),
        ([MI300X, "--html", "gone/profile.html"], "--html is 'gone/profile.html'"),
        ([MI300X, "--tokens", "0"], "is not in the range"),
        ([__file__], "is not a JSON trace"),
    ],
)
def test_wrong_usage_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str | Path], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def unwritable(folder: Path) -> Path:
    """A name too long for any file system: refused for root too."""
    return folder / ("x" * 300)


@pytest.mark.parametrize("option", ["--html", "--svg"])
def test_an_output_that_can_not_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("epfuse.profiling.read_trace.read_trace", lambda *_: pytest.fail("the trace was read"))
    for file in (unwritable(tmp_path), tmp_path, tmp_path / "gone" / "x"):
        result = run(MI300X, option, file)
        assert result.exit_code == 2
        assert f"{option} is" in result.stderr or "directory" in result.stderr


@pytest.mark.parametrize("option", ["--html", "--svg"])
def test_the_table_is_not_lost_when_the_report_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("epfuse.cli.profile.write_atomic", full)
    result = run(MI300X, option, tmp_path / "out")
    assert result.exit_code == 2
    assert "all kernels" in result.stdout
    assert "No space left on device" in result.stderr
    assert json.loads(run(MI300X, "--json", option, tmp_path / "out").stdout)["kernels_total"] == 425


def test_all_that_can_be_refused_is_refused_before_a_trace_is_read(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epfuse.profiling.read_trace.read_trace", lambda *_: pytest.fail("the trace was read"))
    (tmp_path / "other.json").write_text('{"schema": 1, "measurements": []}')
    (tmp_path / "rules.yaml").write_text("rules: 3")
    for arguments in (
        ["--compare", trace, tmp_path / "other.json"],
        ["--compare", trace, "gone.json"],
        [trace, "--window", "first"],
        [trace, "--map", tmp_path / "rules.yaml"],
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    made = TraceFile()
    made.kernel("gate_up_kernel", 0, 5)
    odd = made.write(tmp_path / "odd\x1b[31m\udcff.json")
    result = run(odd, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "odd\ufffd[31m\ufffd.json" in result.stdout
    assert "odd\ufffd[31m\ufffd.json" in (tmp_path / "page.html").read_text(encoding="utf-8")
