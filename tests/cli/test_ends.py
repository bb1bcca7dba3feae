"""How commands end: exit codes, one line on stderr, and no result that is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from epfuse.cli import main as cli
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.environment import environment
from epfuse.errors import ConfigError, MissingDependency

KNOWN = {0, 1, 2, 70, 130}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def child(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Result]:
    """Run a command whose body is what is given."""

    def invoke(body: Callable[[], object]) -> Result:
        module = type("Module", (), {"serve": click.command("serve")(lambda: body())})
        monkeypatch.setitem(cli.COMMANDS, "serve", "")
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
        return run("serve")

    return invoke


def _raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (MissingDependency("needs jinja2"), 2, "needs jinja2"),
        (click.ClickException("needs jinja2"), 2, "needs jinja2"),
        (OSError(errno.ENOSPC, "No space left on device", "r.json"), 2, "r.json: No space left on device"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "input or output failed: Broken pipe"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (RecursionError(), 2, "nested too deeply"),
        (UnicodeEncodeError("ascii", "µ", 0, 1, "no"), 2, "text can't be read or written"),
        (ModuleNotFoundError("no", name="rich"), 2, "needs the package 'rich', which is not installed"),
        (ImportError("undefined symbol", name="torch"), 2, "the package 'torch' can't be loaded: undefined symbol"),
        (TypeError("unhashable"), 70, "a bug of epfuse"),
        (EOFError("short"), 70, "a bug of epfuse"),
        (SystemExit(1), 1, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_what_is_raised_becomes_a_code_and_a_line(
    ending: Callable[[Callable[[], object]], Result], error: BaseException, code: int, words: str
) -> None:
    result = ending(_raises(error))
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 1


def test_a_bug_s_traceback_is_for_who_asks(
    ending: Callable[[Callable[[], object]], Result], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "epfuse"):
        result = ending(_raises(TypeError("unhashable")))
    assert "EPFUSE_LOG=debug shows the traceback" in result.stderr
    assert "Traceback" in caplog.text


def test_a_wrong_variable_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPFUSE_PATH", "fast")
    environment.cache_clear()
    try:
        result = run("verify", "--device", "cpu")
    finally:
        environment.cache_clear()
    assert result.exit_code == 2
    assert "EPFUSE_PATH='fast'" in result.stderr


HELP = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None
from click.testing import CliRunner
from epfuse.cli.main import main
for name in {names}:
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0, (name, done.output)
"""


def test_help_needs_neither_torch_nor_triton() -> None:
    names = [name for name in cli.COMMANDS if name != "plan"]
    done = child(HELP.format(names=names))
    assert done.returncode == 0, done.stderr


def test_the_names_in_options_are_those_of_the_package() -> None:
    from epfuse.aot import calls
    from epfuse.bench.layers import LAYERS
    from epfuse.cli import aot, bench, tune, verify
    from epfuse.policy import READABLE
    from epfuse.target import Target
    from epfuse.tuning.space import Space
    from epfuse.verify.problem import DTYPES, SHAPES

    assert [target.value for target in Target if target.is_gpu] == list(aot.TARGETS)
    paths = tuple(path.value for path in READABLE[Target.GFX942])
    assert (paths, paths) == (aot.PATHS, tune.PATHS)
    assert (tuple(calls.SHAPES), tuple(calls.DTYPES)) == (aot.SHAPES, aot.DTYPES)
    assert tuple(space.value for space in Space) == tune.SPACES
    assert (list(SHAPES), list(DTYPES)) == (verify.SHAPE_NAMES, verify.DTYPE_NAMES)
    assert [*LAYERS, "custom"] == bench.SHAPE_NAMES


CUSTOM = ("--shape", "custom", "--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2")
HUGE = ("--hidden", "1048576", "--intermediate", "1048576", "--experts", "4096", "--top-k", "2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--tokens", "2147483648", "--device", "cpu"), "'2147483648' is not a token count"),
        (("verify", "--tokens", "2147483648", "--device", "cpu"), "'2147483648' is not a token count"),
        (("tune", "--tokens", "1," + "9" * 5000), "is not a token count"),
        (("bench", "--tokens", "²", "--device", "cpu"), "'²' is not a token count"),
        (("bench", *CUSTOM[:2], "--hidden", "9" * 30), "--hidden"),
        (("bench", "--device", "cuda:99999"), "device is 'cuda:99999'"),
        (("bench", "--device", "cuda:" + "9" * 5000), "device is"),
        (("verify", "--device", "cuda:256"), "device is 'cuda:256'"),
        (("tune", "--device", "cuda:256"), "device is 'cuda:256'"),
        (("verify", "--device", "cpu:1"), "device is 'cpu:1'"),
        (("verify", "--device", "cpu", *HUGE), "choose smaller sizes"),
        (("bench", "--device", "cpu", "--shape", "custom", *HUGE), "choose smaller sizes"),
        (("bench", "--device", "cpu", "--compare", "/dev/zero"), "has more than"),
        (("bench", "--device", "cpu", "--html", "/proc/r.html"), "--html is '/proc/r.html', which can't be written"),
        (("bench", "--device", "cpu", "--pictures", "/proc/p"), "--pictures is '/proc/p', which can't be written"),
        (("aot", "--out", "/proc/p"), "--out is '/proc/p', which can't be written"),
        (("aot", "--workers", "1000000"), "--workers"),
    ],
)
def test_absurd_sizes_and_places_exit_2_before_any_work(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""


def test_an_output_that_fails_costs_no_other(tmp_path: Path, ending: Callable[[Callable[[], object]], Result]) -> None:
    def body() -> None:
        delivery = Delivery({"--json": tmp_path / "r.json", "--html": None}, {"--out": tmp_path / "out"})
        with delivery.of("--json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        with delivery.of(STDOUT):
            click.echo("the table")
        delivery.exit(passed=False)

    result = ending(body)
    assert result.exit_code == 2
    assert result.stdout == "the table\n"
    assert "--json could not be written: [Errno 28] No space left on device" in result.stderr


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "r")
    with pytest.raises(ConfigError, match="--json and --html are one file"):
        Delivery({"--json": tmp_path / "r", "--html": tmp_path / "link"})


STREAMS = """
import os, sys
{before}
from epfuse.cli.main import main
main({arguments})
"""


@pytest.mark.parametrize(
    ("before", "arguments", "codes"),
    [
        ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", ["--help"], {2}),
        ("read, write = os.pipe(); os.close(read); os.dup2(write, 1)", ["bench", "--help"], {2}),
        ("os.close(1); sys.stdout = None", ["bench", "--help"], {0}),
        ("os.close(1); os.close(2); sys.stdout = sys.stderr = None", ["frobnicate"], {2}),
    ],
)
def test_a_stdout_that_takes_nothing_or_not_all(before: str, arguments: list[str], codes: set[int]) -> None:
    done = child(STREAMS.format(before=before, arguments=arguments))
    assert done.returncode in codes
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_reader_who_leaves_costs_no_file(tmp_path: Path) -> None:
    """Rich would end here with 1, a failed check, before the page is written."""
    event = {"ph": "X", "cat": "kernel", "name": "nccl_AllReduce", "ts": 1, "dur": 5, "pid": 0, "tid": 7}
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    args = {"device": 0, "stream": 7, "correlation": 1}
    devices = [{"id": 0, "name": "NVIDIA H200"}]
    trace.write_text(json.dumps({"traceEvents": [event | {"args": args}], "deviceProperties": devices}))
    before = "read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    done = child(STREAMS.format(before=before, arguments=["profile", str(trace), "--html", str(page)]))
    assert done.returncode == 2
    assert "standard output could not be written" in done.stderr
    assert page.stat().st_size > 1000


def test_progress_that_nobody_reads_ends_nothing() -> None:
    code = (
        "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 2)\n"
        "from epfuse.report.terminal import Console\n"
        "Console(stderr=True).print('half of it'); print('the result')"
    )
    done = child(code)
    assert (done.returncode, done.stdout) == (0, "the result\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stderr_costs_no_result() -> None:
    code = (
        "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "from epfuse.cli.exits import exit_code\n"
        "sys.exit(exit_code(lambda: print('half of it', file=sys.stderr, flush=True) or print('the result')))"
    )
    done = child(code)
    assert (done.returncode, done.stdout) == (0, "the result\n")


def test_an_ascii_stdout_gets_escapes() -> None:
    code = (
        "import sys; from epfuse.cli.exits import exit_code\n"
        "sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
        "sys.exit(exit_code(lambda: print('12 \\u00b5s')))"
    )
    done = child(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12 \\xb5s\n", "")


def test_ctrl_c_while_a_command_is_imported_exits_130() -> None:
    """The signal comes in the middle of the import, as a user's does who has mistyped."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from epfuse.cli.main import main\n"
        "main(['verify', '--device', 'cpu'])\n"
    )
    done = child(code, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert done.returncode == 130
    assert done.stderr.strip() == "epfuse: interrupted"


def test_a_bench_whose_files_can_not_be_written_shows_all_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epfuse.bench import roofs

    monkeypatch.setattr(roofs, "CPU_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofs, "CPU_MATRIX", 64)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("epfuse.report.write.os.replace", full)
    files = ("--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    result = run("bench", "--device", "cpu", "--quick", *CUSTOM, "--tokens", "1", "--peers", "none", *files)
    assert result.exit_code == 2
    assert "uniform routing" in result.stdout
    record = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert record["complete"]
    assert "--json could not be written" in result.stderr
    assert "--html could not be written" in result.stderr
    assert os.listdir(tmp_path) == []
