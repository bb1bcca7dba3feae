"""tools/beside_peers.py --shapes, with a harness whose kernels take a time that follows from the layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tools import peer_layers
from tools.beside_peers import drawn_counts, main
from tools.peer_layers import text_of
from tools.peer_shapes import MODELS, TWELVE, shard

from epfuse.bench.layers import LAYERS
from epfuse.config import silu_gate
from epfuse.errors import ConfigError

HARNESS = """
import json, os, sys
TOPK = 4
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0
ROOT = "peers-libraries"
H, E = int(os.environ["PEER_H"]) if "PEER_H" in os.environ else 1, 2
PEERS = {}


def nvrtc_dirs():
    return ["nvrtc-folder"]


def peer(name, limit, compile_limit):
    return lambda kind: PEERS.setdefault(name, kind)


class Kernel:
    def us(self, T):
        return T + H


@peer("fast", limit=1, compile_limit=1)
class Fast(Kernel):
    def us(self, T):
        assert "half_a_library" not in sys.modules
        return 2.0 * T


@peer("breaks", limit=1, compile_limit=1)
class Breaks(Kernel):
    def us(self, T):
        os._exit(3)


@peer("prints", limit=1, compile_limit=1)
class Prints(Kernel):
    def us(self, T):
        sys.stdout.buffer.write(b"\\xff is no UTF-8\\n")
        return 3.0 * T


@peer("raises", limit=1, compile_limit=1)
class Raises(Kernel):
    def __init__(self):
        sys.modules["half_a_library"] = None
        raise ValueError("these sizes are not taken")


class Operators(Kernel):
    # ends its process or raises where others of the same names are loaded

    def __init__(self):
        known = sys.modules.setdefault("operators", self.release)
        if known != self.release and self.release == "0.33":
            print("terminate called after throwing an instance of 'c10::Error'", file=sys.stderr, flush=True)
            print("  what():  Tried to register an operator twice", file=sys.stderr, flush=True)
            os.abort()
        assert known == self.release, "Registered schema has 8 args"


@peer("humming_w8a16_indexed", limit=1, compile_limit=1)
class Indexed(Operators):
    release = "0.25"


@peer("humming_w8a16_grouped", limit=1, compile_limit=1)
class Grouped(Operators):
    release = "0.33"


@peer("sleeps", limit=1, compile_limit=1)
class Sleeps(Kernel):
    def us(self, T):
        import time
        time.sleep(60)


@peer("wrong", limit=1, compile_limit=1)
class Wrong(Kernel):
    def us(self, T):
        return 1.0


@peer("impl", limit=1, compile_limit=1)
class External(Kernel):
    path = "w8a16"

    def __init__(self):
        assert os.environ["PEER_IMPL"].endswith(":w8a16"), "another path's"
        os.environ["PEER_IMPL"] = "left by this one:w8a8"

    def us(self, T):
        return T + (50.0 if TOPK == 8 and ALPHA == 1.0 and LIMIT > 1e38 else 2000.0)


def child(name, phase, tokens):
    with open(os.environ["ASKED"], "a") as asked:
        asked.write(f"{os.getpid()} {phase} {name} {H} {os.environ['PYTHONPATH'].split(':')[0]}\\\\n")
    if name == "ceiling":
        print("NOTE A card: copy 2.44 TB/s (read + written), read 3.17 TB/s, bf16 8192^3 710 TFLOP/s")
        return
    kernel = PEERS[name]()
    for T in tokens if phase == "time" else ():
        row = {"peer": name, "T": T, "us": kernel.us(T), "err": 0.5 if name == "wrong" else 1e-3, "best": True}
        print("ROW", json.dumps(row), flush=True)


if __name__ == '__main__':
    raise SystemExit("not to be run")
""".replace("\\\\n", "\\n")


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    (tmp_path / "peers.py").write_text(HARNESS)
    return tmp_path / "peers.py"


def run(harness: Path, *options: str) -> tuple[int, str, Path]:
    record = harness.with_name("record.json")
    done = CliRunner().invoke(main, [str(harness), str(record), "--jobs", "2", *options])
    return done.exit_code, done.output, record


def asked(harness: Path) -> list[list[str]]:
    return [line.split() for line in harness.with_name("asked").read_text().splitlines()]


def test_all_layers_are_timed_in_one_process_at_their_own_counts(harness: Path) -> None:
    shapes = "qwen3-30b-ep4,minimax-m3-tp8"
    code, output, path = run(harness, "--shapes", shapes, "--draw", "2", "--seed", "7", "--peers", "fast")
    assert code == 0, output
    record = json.loads(path.read_text())
    counts = {name: drawn_counts(2, f"7 {name}") for name in shapes.split(",")}
    assert counts["qwen3-30b-ep4"] != counts["minimax-m3-tp8"]
    assert {each["layer"]: tuple(each["tokens"]) for each in record["layers"]} == counts
    assert record["read_tb_s"] == 3.17
    for each in record["layers"]:
        extra = 50.0 if each["layer"] == "qwen3-30b-ep4" else 2000.0  # top-k 8 and silu, or M3's own
        expected = [("impl", T, T + extra) for T in each["tokens"]] + [("fast", T, 2.0 * T) for T in each["tokens"]]
        assert [(row["peer"], row["T"], row["us"]) for row in each["rows"]] == expected
    timed = [line for line in asked(harness) if line[1] == "time"]
    assert len({pid for pid, *_ in timed}) == 1
    assert [(name, width) for _, _, name, width, _ in timed] == [
        ("ceiling", "2048"), ("impl", "2048"), ("fast", "2048"), ("impl", "6144"), ("fast", "6144"),
    ]  # fmt: skip
    assert {line[4] for line in timed} == {"peers-libraries"}
    assert [line[2] for line in asked(harness) if line[1] == "compile"] == ["fast", "fast"]  # ours: without the harness


def test_what_is_compiled_is_timed_at_once(harness: Path) -> None:
    code, output, _ = run(harness, "--shapes", "qwen3-30b-ep4", "--tokens", "3", "--peers", "fast", "--compiled")
    assert code == 0, output
    assert {line[1] for line in asked(harness)} == {"time"}
    assert "compiled" not in output


def test_a_kernel_that_breaks_its_process_or_raises_costs_nobody_else_a_row(harness: Path) -> None:
    code, output, path = run(
        harness, "--shapes", "qwen3-30b-ep4,glm-4.5-tp4", "--tokens", "3,9", "--peers", "breaks,raises,wrong,fast"
    )
    assert code == 0, output
    record = json.loads(path.read_text())
    for each in record["layers"]:
        assert [row["peer"] for row in each["rows"]] == ["impl", "impl", "wrong", "wrong", "fast", "fast"]
    assert [(kernel, why) for _, kernel, why in record["failed"]] == [
        ("breaks", "its process ended, exit code 3: nothing on stderr"),
        ("raises", "ValueError: these sizes are not taken"),
    ] * 2
    assert "lost: qwen3-30b-ep4 at 3 tokens, 53.0 us for 6.0 of fast: 8.833" in output
    assert "wrong: wrong on glm-4.5-tp4 at 9 tokens, error 0.5" in output


def test_kernels_whose_libraries_exclude_each_other_have_a_process_each(harness: Path) -> None:
    peers = "humming_w8a16_indexed,humming_w8a16_grouped,fast"
    code, output, path = run(harness, "--shapes", "qwen3-30b-ep4,glm-4.5-tp4", "--tokens", "3", "--peers", peers)
    assert code == 0, output
    record = json.loads(path.read_text())
    assert record["failed"] == []
    assert [[row["peer"] for row in each["rows"]] for each in record["layers"]] == [["impl", *peers.split(",")]] * 2
    timed = {name: {pid for pid, phase, kernel, *_ in asked(harness) if (phase, kernel) == ("time", name)}
             for name in peers.split(",")}  # fmt: skip
    assert timed["fast"] == timed["humming_w8a16_indexed"] != timed["humming_w8a16_grouped"]
    assert {len(pids) for pids in timed.values()} == {1}  # for both layers


def test_how_a_process_ended_is_said(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_layers, "APART", ())
    peers = "humming_w8a16_indexed,humming_w8a16_grouped,fast"
    code, output, path = run(harness, "--shapes", "qwen3-30b-ep4", "--tokens", "3", "--peers", peers, "--compiled")
    assert code == 0, output
    record = json.loads(path.read_text())
    why = (
        "its process ended, SIGABRT: terminate called after throwing an instance of 'c10::Error'"
        " | what(): Tried to register an operator twice"
    )
    assert record["failed"] == [["qwen3-30b-ep4", "humming_w8a16_grouped", why]]
    assert [row["peer"] for row in record["rows"]] == ["impl", "humming_w8a16_indexed", "fast"]
    assert why in output


def test_a_kernel_may_print_any_bytes(harness: Path) -> None:
    options = ("--shapes", "qwen3-30b-ep4", "--tokens", "3", "--peers", "prints,fast", "--compiled", "--seconds", "20")
    code, output, path = run(harness, *options)
    assert code == 0, output
    assert {row["peer"] for row in json.loads(path.read_text())["rows"]} >= {"prints", "fast"}


def test_a_kernel_that_hangs_is_ended_and_the_rest_goes_on(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_layers, "PATIENCE", 3.0)
    code, output, path = run(harness, "--shapes", "qwen3-30b-ep4", "--tokens", "3", "--peers", "sleeps,fast")
    assert code == 0, output
    record = json.loads(path.read_text())
    assert [(kernel, why) for _, kernel, why in record["failed"]] == [("sleeps", "nothing for 3 s")]
    assert [row["peer"] for row in record["rows"]] == ["impl", "fast"]


def test_what_the_time_did_not_reach_is_named(harness: Path) -> None:
    options = ("--shapes", "qwen3-30b-ep4,glm-4.5-tp4", "--tokens", "3", "--peers", "fast,sleeps")
    code, output, path = run(harness, *options, "--seconds", "4")
    assert code == 0, output
    record = json.loads(path.read_text())
    assert record["failed"] == [["qwen3-30b-ep4", "sleeps", "time is up"]]
    assert record["left_out"] == [["glm-4.5-tp4", name] for name in ("impl", "fast", "sleeps")]
    assert "not reached: fast on glm-4.5-tp4" in output


def test_means_are_of_right_rows_with_a_peer() -> None:
    def row(peer: str, tokens: int, us: float, err: float = 1e-3) -> dict[str, object]:
        return {"peer": peer, "T": tokens, "us": us, "err": err}

    rows = [row("impl", 1, 4.0), row("p", 1, 8.0), row("q", 1, 1.0, err=0.2), row("impl", 2, 9.0), row("p", 2, 4.5)]
    rows += [row("impl", 3, 1.0)]
    record = {"layers": [{"layer": "one", "rows": rows}], "failed": [], "left_out": []}
    text = text_of(record, "impl")
    assert "| one | 1: 4.0 (0.50), 2: 9.0 (2.00), 3: 1.0 | 1.000 | 2.000 |" in text
    assert "2 points: geometric mean 1.000, at most 2.000" in text
    assert "lost: one at 2 tokens, 9.0 us for 4.5 of p: 2.000" in text
    assert "lost: none" not in text


def test_an_error_that_is_no_number_is_wrong() -> None:
    """A kernel that returns NaN has such an error, which is not above any bound."""
    nan = float("nan")
    rows = [{"peer": peer, "T": 1, "us": 1.0, "err": err} for peer, err in (("impl", nan), ("p", nan), ("q", 1e-3))]
    text = text_of({"layers": [{"layer": "one", "rows": rows}], "failed": [], "left_out": []}, "impl")
    assert "wrong: impl on one at 1 tokens, error nan" in text
    assert "wrong: p on one at 1 tokens, error nan" in text
    assert "wrong: q" not in text


@pytest.mark.parametrize(("kernel", "words"), [("fast", "no time of any peer"), ("impl", "no time of ours")])
def test_what_is_wrong_is_no_time(harness: Path, kernel: str, words: str) -> None:
    harness.write_text(HARNESS.replace('0.5 if name == "wrong"', f'float("nan") if name == "{kernel}"'))
    code, output, _ = run(harness, "--shapes", "qwen3-30b-ep4,glm-4.5-tp4", "--tokens", "3", "--peers", "fast")
    assert code == 1, output
    assert words in output


def test_names_of_ranks() -> None:
    assert shard("minimax-m3-ep8").shape == LAYERS["minimax-m3-ep8"].shape
    assert shard("minimax-m3-tp8").shape == LAYERS["minimax-m3-tp8"].shape
    layer = shard("glm-4.5-tp4")
    assert (layer.shape.intermediate, layer.shape.local_experts, layer.activation) == (384, 160, silu_gate())
    assert len({shard(name).shape for name in TWELVE}) == 12
    assert {name.rsplit("-", 1)[0] for name in TWELVE} >= MODELS.keys() - {"gpt-oss-20b"}


@pytest.mark.parametrize("name", ["minimax-m3", "minimax-m3-dp8", "minimax-m3-ep7", "gpt-5-ep8", "minimax-m3-ep0"])
def test_what_is_no_rank(name: str) -> None:
    with pytest.raises(ConfigError):
        shard(name)


def test_one_layer_s_record_is_as_that_of_layer(harness: Path) -> None:
    harness.write_text(HARNESS.replace('"err":', '"tbs": 1.0, "tflops": 1.0, "err":'))
    picture = harness.with_name("picture.svg")
    options = ("--shapes", "minimax-m3-ep8", "--tokens", "1,16", "--peers", "fast", "--picture", str(picture))
    code, output, path = run(harness, *options)
    assert code == 0, output
    record = json.loads(path.read_text())
    assert (record["layer"], record["tokens"], record["device"]) == ("minimax-m3-ep8", [1, 16], "A card")
    assert [(row["peer"], row["T"]) for row in record["rows"]] == [("impl", 1), ("impl", 16), ("fast", 1), ("fast", 16)]
    assert "| w8a16 over the fastest peer | 1000.500 | 63.000 |" in output
    assert "lost: minimax-m3-ep8 at 1 tokens" in output
    assert picture.read_text().startswith("<svg")


def test_a_picture_shows_one_layer(harness: Path) -> None:
    code, output, _ = run(harness, "--shapes", "all", "--picture", str(harness.with_name("picture.svg")))
    assert code == 2
    assert "--picture shows one layer" in output
