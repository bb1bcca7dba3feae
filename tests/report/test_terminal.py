"""Every table can be read in 80 columns and without colour, and what takes long has a bar of one kind."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")  # the tuner's tables

from epfuse.bench.console import print_record
from epfuse.bench.layers import make_layer
from epfuse.bench.weights import LayerWeights
from epfuse.config import LayerShape, Path, Policy, WeightFormat
from epfuse.families.family import Stage
from epfuse.hardware.products import PRODUCTS
from epfuse.planning import console as planning
from epfuse.planning.model_plan import Serving, plan_model
from epfuse.report.terminal import Console, bars, figures, in_parts, make_table
from epfuse.target import Target
from epfuse.tuning import console as tuning
from epfuse.verify import suite
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import make_scenarios
from epfuse.verify.subject import subjects_of
from epfuse.weights.model_config import MINIMAX_M3
from tests.bench.records import peer, record, row

COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-8]|9[0-7])[0-9;]*m")
MADE = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
TILE = "192x128.g2.4w.4s.parts=1.head=32"
TILES = f"128/{TILE}/{TILE}"
Show = Callable[[Console], object]


def bench(console: Console) -> None:
    rows = (row("w8a16", us=1234.5), row("bf16", us=2345.6), peer("transformers grouped_mm", 23456.7))
    print_record(record(*rows, row("w8a8", failure="out of memory", us=None)), None, console)


def plan(console: Console) -> None:
    product = PRODUCTS["h200"]
    planning.show(plan_model(MINIMAX_M3, Serving(product, 8, 9472, product.hbm_bytes), Policy.AUTO), None, console)


def outcome(tokens: int) -> SimpleNamespace:
    rows = {stage: [SimpleNamespace(block_m=128, roofline=0.91)] for stage in (Stage.GATE_UP, Stage.DOWN)}
    point = SimpleNamespace(path=Path.BLOCK_FP8, tokens=tokens)
    return SimpleNamespace(
        point=point, before_us=1234.5, after_us=1204.5, tiles=SimpleNamespace(block_m=128, key=TILES), rows=rows
    )


def tune(console: Console) -> None:
    device = SimpleNamespace(name="NVIDIA H200", target=Target.SM90, torch="2.13.0", triton="3.7.1")
    request = SimpleNamespace(device=device, shape=LayerShape(6144, 3072, 128, 16, 4), folder=FilePath("tables"))
    tuning.show(request, [outcome(64), outcome(8192)], 3, console)


def shown(show: Show, **how: object) -> str:
    """What a command's console prints in 80 columns."""
    file = io.StringIO()
    show(Console(file=file, width=80, **how))
    return file.getvalue()


@pytest.mark.parametrize("show", [bench, plan, tune])
def test_80_columns_hold_all_of_it(show: Show) -> None:
    text = shown(show)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off


@pytest.mark.parametrize("show", [plan, tune])
def test_a_narrow_table_breaks_no_tile(show: Show) -> None:
    keys = re.findall(r"\d+x\d+\.g\S+", shown(show))
    assert keys
    assert all(re.fullmatch(r"\d+x\d+\.g\d+\.\d+w\.\d+s(\.\w+=\d+)*", key) for key in keys)


def test_a_narrow_table_breaks_no_name() -> None:
    words = set(re.split(r"\s+", shown(bench)))
    assert {"w8a16", "fragment", "transformers", "grouped_mm", "1234.0..1235.0"} <= words


def test_a_reason_that_many_calls_share_is_said_once() -> None:
    text = " ".join(shown(plan).split())
    assert text.count("It makes BF16's products from half the bytes") == 1
    assert re.search(r"^1: It makes BF16's", shown(plan), flags=re.MULTILINE)


def test_bench_says_by_words_what_it_says_by_colour() -> None:
    assert "FAIL: w8a8 fragment, T=64, uniform: out of memory" in shown(bench)


@pytest.mark.parametrize("show", [bench, plan, tune])
def test_no_color(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    def colourful(console: Console) -> None:
        table = make_table("path", figures("T"))
        table.add_row("[green]pass", "1")
        console.print(table)
        show(console)

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(shown(colourful, force_terminal=True, color_system="standard"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(shown(colourful, force_terminal=True, color_system="standard"))


def test_a_tile_is_broken_between_its_parts() -> None:
    assert in_parts(TILES).split() == ["128", "/", TILE, "/", TILE]


def test_a_bar_takes_any_text() -> None:
    file = io.StringIO()
    with bars(console=Console(file=file, width=80, force_terminal=True), time_left=True) as progress:
        task = progress.add_task("reading [/]notes[bold]", total=2)
        progress.advance(task)
        progress.refresh()
    assert "reading [/]notes[bold]" in file.getvalue()
    assert "1/2" in file.getvalue()


def test_verify_says_what_it_makes_before_it_checks() -> None:
    problem = Problem(hidden=32, intermediate=32, experts=4, top_k=2, ep_size=2, tokens=(1,), **MADE)
    said: list[str] = []
    scenarios = make_scenarios(problem)[:1]
    suite.run(problem, subjects_of(problem, "reference"), lambda: said.append("step"), scenarios, said.append)
    first, second = said.index("rank 0 of 2"), said.index("rank 1 of 2")
    assert "weights of rank 0" in said[first - 1]
    assert "step" in said[first:second]


def test_bench_and_tune_say_when_they_make_weights() -> None:
    said: list[str] = []
    layer = make_layer("custom", {"hidden": 64, "intermediate": 64, "experts": 4, "top_k": 2, "ep_size": 2}, None)
    weights = LayerWeights(layer, 0, torch.device("cpu"), said.append)
    assert not said
    weights.in_format(WeightFormat.MXFP8)
    weights.in_format(WeightFormat.DENSE)
    weights.in_format(WeightFormat.DENSE)
    assert [what.partition(" weights")[0] for what in said] == ["making", "rearranging"]
