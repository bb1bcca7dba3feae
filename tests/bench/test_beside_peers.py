"""tools/beside_peers.py with a harness that only says what it was asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tools.beside_peers import drawn_counts, main, table_of
from tools.peer_harness import MAIN_LINE, MARLIN_LINES, MULTIPLES, ROUTING_LINE, TOP_K_LINE, harness_for

from epfuse.bench.layers import LAYERS
from epfuse.bench.routing import Routing
from epfuse.errors import EpfuseError

HARNESS = (
    """
import json, os, sys
TOPK = 4
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0
PEERS = {}


def peer(name, limit, compile_limit):
    return lambda kind: PEERS.setdefault(name, kind)


@peer("slow", limit=1, compile_limit=1)
class Slow:
    us = 9.0


@peer("fast", limit=1, compile_limit=1)
class Fast:
    us = 4.0


@peer("impl", limit=1, compile_limit=1)
class External:
    def __init__(self):
        self.us = {"w8a16": 3.0, "w8a8": 2.0}[os.environ["PEER_IMPL"].rsplit(":", 1)[1]]
E, EL, DEV = 128, 16, "cpu"


def draw(T, g):
    import torch

    for s in range(1):
"""
    + ROUTING_LINE
    + """        return ids


def main():
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if "refused" in given["--only"]:
        sys.exit(3)
    with open(os.environ["ASKED"], "a") as asked:
        asked.write(f"{given['--phase']} {given['--only']} {os.environ['PEER_H']} {TOPK}\\n")
        asked.write(f"tokens {given['--tokens']}\\n")
    os.environ["PEER_IMPL"] = given["--impl"]
    names = [name for name in PEERS if name in given["--only"].split(",")]
    if given["--phase"] == "time":
        print("ceiling   A card: copy 2.44 TB/s (read + written), read 3.17 TB/s, bf16 8192^3 710 TFLOP/s")
        rows = []
        for name in names:
            us = PEERS[name]().us
            print(name, flush=True)
            if os.environ.get("STOPS_AT") == name:
                sys.exit(5)
            rows += [
                {"peer": name, "T": T, "us": us * T, "tbs": 1.0, "tflops": 1.0, "best": best,
                 "err": 0.5 if name == os.environ.get("WRONG") else 1e-3}
                for T in (1, 16)
                for best in (True, False)
            ]
            json.dump(rows, open(given["--out"], "w"))


if __name__ == '__main__':
    main()
"""
)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    (tmp_path / "peers.py").write_text(HARNESS)
    return tmp_path / "peers.py"


def run(harness: Path, *options: str) -> tuple[int, str, Path]:
    record = harness.with_name("record.json")
    done = CliRunner().invoke(main, [str(harness), str(record), "--tokens", "1,16", *options])
    return done.exit_code, done.output, record


def test_ours_runs_first_and_all_is_one_record(harness: Path) -> None:
    picture = harness.with_name("picture.svg")
    code, output, path = run(harness, "--peers", "fast,slow", "--picture", str(picture))
    assert code == 0, output
    asked = harness.with_name("asked").read_text().splitlines()[::2]
    assert asked == ["compile impl,fast,slow 6144 4", "time impl,fast,slow 6144 4"]
    record = json.loads(path.read_text())
    assert (record["device"], record["read_tb_s"], record["bf16_tflop_s"]) == ("A card", 3.17, 710)
    assert [(row["peer"], row["T"]) for row in record["rows"]] == [
        (peer, T) for peer in ("impl", "fast", "slow") for T in (1, 16)
    ]
    assert "| w8a16 over the fastest peer | 0.750 | 0.750 |" in output
    assert picture.read_text().startswith("<svg")


def test_what_is_compiled_is_timed_at_once(harness: Path) -> None:
    code, output, _ = run(harness, "--peers", "fast", "--compiled")
    assert code == 0, output
    assert harness.with_name("asked").read_text().splitlines()[::2] == ["time impl,fast 6144 4"]


def test_each_path_of_ours_is_a_kernel_and_the_first_are_ours(harness: Path) -> None:
    picture = harness.with_name("picture.svg")
    code, output, path = run(
        harness, "--paths", "w8a16,w8a8", "--peers", "fast", "--tokens", "1,16", "--picture", str(picture)
    )
    assert code == 0, output
    assert [(row["peer"], row["us"]) for row in json.loads(path.read_text())["rows"]] == [
        (peer, us * T) for peer, us in (("impl", 3.0), ("impl_w8a8", 2.0), ("fast", 4.0)) for T in (1, 16)
    ]
    assert "| w8a16 over the fastest peer | 0.750 | 0.750 |\n| w8a8 over the fastest peer | 0.500 | 0.500 |" in output
    assert "epfuse w8a8" in picture.read_text()


def test_what_was_timed_before_the_harness_ended_is_kept(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOPS_AT", "fast")
    code, output, path = run(harness, "--peers", "slow,fast")
    assert code == 2
    assert "exit code 5" in output
    assert {row["peer"] for row in json.loads(path.read_text())["rows"]} == {"impl", "slow"}


def test_the_means_are_of_the_counts_that_both_have() -> None:
    rows = [{"peer": "impl", "T": T, "us": us, "err": 1e-3} for T, us in ((1, 2.0), (7, 9.0), (8, 1.0))]
    rows += [{"peer": "fast", "T": T, "us": us, "err": 1e-3} for T, us in ((1, 4.0), (7, 4.5))]
    assert table_of({"rows": rows}).endswith("\nw8a16: geometric mean of 2 1.000, at most 2.000, at 7 tokens\n")


def test_counts_are_drawn_by_the_seed_over_all_sizes(harness: Path) -> None:
    drawn = drawn_counts(40, 7)
    assert len(set(drawn)) == 40
    assert drawn == drawn_counts(40, 7) != drawn_counts(40, 8)
    assert list(drawn) == sorted(drawn)
    assert min(drawn) >= 1
    assert max(drawn) <= 16384
    assert 5 < sum(count <= 128 for count in drawn) < 35  # half of the range's octaves
    code, output, _ = run(harness, "--draw", "3", "--seed", "7", "--peers", "fast")
    assert code == 0, output
    counts = ",".join(map(str, drawn_counts(3, 7)))
    assert harness.with_name("asked").read_text().count(counts) == 2


def test_few_configurations_of_humming_are_compiled_and_timed() -> None:
    few = (LAYERS["minimax-m3-ep8"], Routing.parse("uniform"), ("w8a16",), "fast", 2)
    source = harness_for(f"{MAIN_LINE}    compiled, timed = {MULTIPLES}, {MULTIPLES}\n", *few)
    assert source.endswith("compiled, timed = (1, 0.25), (1, 0.25)\n")
    marlin = harness_for(f"{MAIN_LINE}    pass\n{MARLIN_LINES}# {MULTIPLES}\n", *few)
    assert "default" not in marlin
    assert "T <= 16" in marlin
    with pytest.raises(EpfuseError, match="humming's configurations"):
        harness_for(MAIN_LINE, *few)


def test_sizes_and_top_k_go_to_the_harness(harness: Path) -> None:
    code, output, path = run(harness, "--peers", "fast", "--layer", "qwen3-235b", "--routing", "zipf:1.2")
    assert code == 0, output
    assert harness.with_name("asked").read_text().splitlines()[0] == "compile impl,fast 4096 8"
    assert json.loads(path.read_text())["routing"] == "zipf:1.2"


def test_without_a_peer_s_time_the_exit_code_says_so(harness: Path) -> None:
    code, output, path = run(harness, "--peers", "missing")
    assert code == 1
    assert "no time of any peer" in output
    assert path.exists()


def test_a_wrong_kernel_has_no_time(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the fastest: the harness gives the row of a kernel all of whose configurations are wrong."""
    monkeypatch.setenv("WRONG", "fast")
    picture = harness.with_name("picture.svg")
    code, output, path = run(harness, "--peers", "fast,slow", "--picture", str(picture))
    assert code == 0, output
    assert "| w8a16 over the fastest peer | 0.333 | 0.333 |" in output
    assert "wrong: fast at 16 tokens, error 0.5" in output
    assert [row["peer"] for row in json.loads(path.read_text())["rows"]] == [
        "impl",
        "impl",
        "fast",
        "fast",
        "slow",
        "slow",
    ]
    assert "fast" not in picture.read_text()
    monkeypatch.setenv("WRONG", "impl")
    assert run(harness, "--peers", "fast")[0] == 1


@pytest.mark.parametrize("options", [("--routing", "zipf"), ("--routing", "all-to:17")])
def test_a_routing_that_is_none(harness: Path, options: tuple[str, ...]) -> None:
    code, output, path = run(harness, *options)
    assert code == 2
    assert options[1] in output or "17" in output
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--tokens", "1,x"), "'1,x' is no list of token counts"),
        (("--seconds", "0"), "0.0 is not in the range"),
        (("--picture", "missing/picture.svg"), "the folder missing does not exist"),
        (("--peers", "refused"), "the harness ended with exit code 3"),
    ],
)
def test_what_cannot_work_ends_in_an_error(harness: Path, options: tuple[str, ...], complaint: str) -> None:
    code, output, path = run(harness, *options)
    assert code
    assert complaint in output
    assert not path.exists()


def test_a_harness_that_is_no_text(harness: Path) -> None:
    harness.write_bytes(b"\xff\xfe\x00")
    code, output, _ = run(harness)
    assert code == 2
    assert "can't decode" in output


def test_a_harness_without_the_lines_is_refused() -> None:
    with pytest.raises(EpfuseError, match="0 times the line 'TOPK = 4'"):
        harness_for(MAIN_LINE, LAYERS["qwen3-235b"], Routing.parse("uniform"), ("w8a16",), "fast")
    with pytest.raises(EpfuseError, match="0 times the line"):
        harness_for(TOP_K_LINE, LAYERS["gpt-oss-20b"], Routing.parse("uniform"), ("w8a16",), "fast")


@pytest.mark.parametrize("routing", ["zipf:1.2", "all-to:2"])
def test_the_routings_draw_what_they_say(routing: str, tmp_path: Path) -> None:
    """The replaced lines run: experts are distinct, and the popular ones or the first ones are taken."""
    source = harness_for(HARNESS, LAYERS["minimax-m3-ep8"], Routing.parse(routing), ("w8a16", "bf16"), "fast")
    assert TOP_K_LINE in source
    (tmp_path / "replaced.py").write_text(source)
    spec = importlib.util.spec_from_file_location("replaced", tmp_path / "replaced.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ids = module.draw(2000, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in ids.tolist())
    counts = torch.bincount(ids.reshape(-1), minlength=128)
    if routing == "all-to:2":
        assert counts[:2].tolist() == [2000, 2000]
        assert counts[2:16].sum() == 0
    else:
        first, second = counts.sort(descending=True).values[:2].tolist()
        assert 1200 < first < 2000
        assert second < first
