"""The page and the exports of a run, whole and damaged."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from epfuse.cli.main import main
from epfuse.serving.done import End
from epfuse.serving.export import aggregates, table
from epfuse.serving.facts import ABSENT, HIDDEN, UNKNOWN, differences
from epfuse.serving.layout import RunFolder, write_model
from epfuse.serving.page import serve_page
from epfuse.serving.record import RunRecord, collect
from epfuse.serving.verdict import Word
from tests.serving.runs import LABEL, make_run


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"))


LAST = "minimaxm3_8k1k-c256-tp8-ep8"
FIRST = "minimaxm3_1k1k-c1-tp8"


def test_a_whole_run_has_all_its_points_and_a_verdict_for_each(whole: RunFolder) -> None:
    record = collect(whole)
    assert record.ok
    assert [point.state for point in record.points] == ["done"] * 6
    assert {verdict.word for verdict in record.verdicts.values()} == {Word.FASTER}
    for verdict in record.verdicts.values():
        assert verdict.effect == pytest.approx(0.051, abs=0.002)
        assert verdict.pairs == 4


def test_the_page_needs_nothing_but_itself_and_escapes(whole: RunFolder) -> None:
    page = serve_page(collect(whole), 1.8e9)
    assert "&lt;b&gt;made up" in page
    assert "<b>made up" not in page
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|https?://", page)
    for link in re.findall(r'href="([^"]*)"', page):
        assert (whole.path / link).is_file(), link
    for words in (LAST, "faster", "plugin_sha256", "steady window", "4", "interval"):
        assert words in page


def test_a_run_on_cpus_has_ranks_and_no_gpus(tmp_path: Path) -> None:
    run = make_run(tmp_path, pairs=2)
    for point in run.read_run().points:
        write_model(run.point(point).job, run.read_job(point).model_copy(update={"gpus": 0, "gpu_vendor": "none"}))
    page = serve_page(collect(run), 1.8e9)
    assert "tokens/s/rank" in page
    assert "tokens/s/GPU" not in page


def _differences(record: RunRecord) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
    common, differing = differences((point.name, point.arms, point.facts) for point in record.points)
    return common, dict(differing)


def test_the_environment_s_differences_are_told_apart(whole: RunFolder) -> None:
    common, differing = _differences(collect(whole))
    assert common["packages.vllm"] == "0.33.0"
    strict, aiter = "variable.EPFUSE_STRICT", "variable.VLLM_ROCM_USE_AITER_MOE"
    assert set(differing) == {"plugin_sha256", "epfuse put in", "variable.VLLM_PLUGINS", strict, aiter}
    values = differing["plugin_sha256"]
    assert len(values["bbbb"]) == len(values["cccc"]) == 6
    assert {value: len(who) for value, who in differing[aiter].items()} == {ABSENT: 6, "0": 6}


def _change_arm(run: RunFolder, point: str, number: int, argv: tuple[str, ...], **env: str) -> None:
    job = run.read_job(point)
    arm = job.arms[number]
    server = arm.server.model_copy(update={"argv": (*arm.server.argv, *argv), "env": arm.server.env | env})
    arms = [*job.arms]
    arms[number] = arm.model_copy(update={"server": server})
    write_model(run.point(point).job, job.model_copy(update={"arms": tuple(arms)}))


def test_arms_that_differ_in_their_arguments_alone_are_shown_to_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path, pairs=2)
    _change_arm(run, FIRST, 1, ("--enable-expert-parallel",), HF_TOKEN="hf_much_kept")
    record = collect(run)
    _, differing = _differences(record)
    assert differing["arguments.added"]["--enable-expert-parallel"] == [f"{FIRST} candidate"]
    assert differing["variable.HF_TOKEN"][HIDDEN] == [f"{FIRST} candidate"]
    page = serve_page(record, 1.8e9)
    assert "--enable-expert-parallel" in page
    assert "hf_much_kept" not in page


def test_a_package_of_one_arm_is_not_said_to_be_everywhere() -> None:
    """Nor are two arms whose names have dots taken for one another."""
    names = ["v0.25", "v0.25.1"]
    facts = {
        "node": "n1",
        "arms.v0.25.packages.vllm": "0.25.0",
        "arms.v0.25.1.packages.vllm": "0.25.1",
        "arms.v0.25.1.packages.epfuse": "1",
    }
    common, differing = differences([("p", names, facts)])
    assert common == {"node": "n1"}
    assert dict(differing) == {
        "packages.vllm": {"0.25.0": ["p v0.25"], "0.25.1": ["p v0.25.1"]},
        "packages.epfuse": {ABSENT: ["p v0.25"], "1": ["p v0.25.1"]},
    }
    unasked = {"arms.v0.25.packages.(unknown)": "no python3", "arms.v0.25.1.packages.epfuse": "1"}
    assert dict(differences([("p", names, unasked)])[1]) == {
        "packages.epfuse": {UNKNOWN: ["p v0.25"], "1": ["p v0.25.1"]}
    }


@pytest.mark.parametrize(("at", "arms"), [(6, ["baseline"]), (7, [])])
def test_an_arm_that_once_answered_wrongly_has_no_speed_at_all(tmp_path: Path, at: int, arms: list[str]) -> None:
    """Its earlier servers passed; a verdict and aggregates from them would say that it is faster."""
    run = make_run(tmp_path, pairs=4)
    done = run.read_done(FIRST)
    assert done is not None
    wrong = done.legs[at].model_copy(update={"state": End.GATED_OUT, "reason": "answers differ by 3 nats"})
    assert wrong.arm == ("candidate" if arms else "baseline")
    update = {"state": End.GATED_OUT, "reason": wrong.reason, "legs": (*done.legs[:at], wrong)}
    write_model(run.point(FIRST).done, done.model_copy(update=update))
    record = collect(run)
    assert record.verdicts[FIRST].word is Word.FEW
    assert record.verdicts[FIRST].pairs == 0
    expected = {f"agg_{FIRST}_{arm}.json" for arm in arms}
    assert {name for name in aggregates(record) if "1k1k-c1-" in name} == expected
    rows = [row for row in csv.DictReader(io.StringIO(table(record))) if row["point"] == FIRST]
    assert {row["arm"] for row in rows if row["total_tokens_per_s"]} == set(arms)
    assert f"its speed does not count: leg {wrong.number}" in serve_page(record, 1.8e9)


FIELDS = {
    *("hw", "conc", "image", "model", "infmax_model_prefix", "framework", "precision", "spec_decoding", "disagg"),
    *("recipe_fingerprint", "isl", "osl", "is_multinode", "tp", "pp", "dcp_size", "pcp_size", "ep", "dp_attention"),
    *("tput_per_gpu", "output_tput_per_gpu", "input_tput_per_gpu"),
}


def test_aggregates_have_inferencex_fields_and_units(whole: RunFolder) -> None:
    record = collect(whole)
    found = aggregates(record)
    assert len(found) == 12
    one = found[f"agg_{LAST}_baseline.json"]
    assert set(one) >= FIELDS
    assert (one["hw"], one["conc"], one["tp"], one["ep"], one["pp"]) == ("mi300x", 256, 8, 8, 1)
    assert (one["dp_attention"], one["is_multinode"], one["disagg"]) == ("false", False, False)
    assert one["label"] == LABEL
    legs = [found for leg, found in record.points[-1].measured if leg.leg.arm == "baseline"]
    ordered = sorted(leg.total_throughput for leg in legs)
    assert one["tput_per_gpu"] == pytest.approx((ordered[1] + ordered[2]) / 2 / 8)
    assert one["tput_per_gpu"] == pytest.approx(one["output_tput_per_gpu"] + one["input_tput_per_gpu"], rel=0.01)
    assert 0.01 < one["median_tpot"] < 0.03  # seconds
    for name in ("mean", "median", "p90", "p99", "p99.9", "std"):
        for short in ("ttft", "tpot", "itl", "e2el"):
            assert one[f"{name}_{short}"] > 0
        assert one[f"{name}_intvty"] == pytest.approx(1 / one[f"{name}_tpot"])


def test_the_csv_has_a_row_a_leg(whole: RunFolder) -> None:
    rows = list(csv.DictReader(io.StringIO(table(collect(whole)))))
    assert len(rows) == 6 * 8
    assert {row["verdict"] for row in rows} == {"faster"}
    assert float(rows[0]["median_tpot_ms"]) > 1


def test_commands(whole: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = tmp_path / "page.html"
    result = cli("report", str(whole.path), "--html", str(page))
    assert result.exit_code == 0, result.output
    assert LABEL in result.stdout
    assert page.stat().st_size > 10_000
    record = json.loads(cli("report", str(whole.path), "--html", str(page), "--json").stdout)
    assert record["ok"]
    assert record["points"][0]["verdict"]["word"] == "faster"
    result = cli("export", str(whole.path), "--inferencex", str(out), "--csv", str(tmp_path / "t.csv"), "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == len(list(out.glob("agg_*.json"))) == 12
    assert cli("export", str(whole.path)).exit_code == 2
    for command in ("report", "export"):
        assert cli(command, str(tmp_path), *(["--json"] if command == "export" else [])).exit_code == 2


DAMAGE = {
    "torn result": lambda run: _result(run).write_text(_result(run).read_text()[:500]),
    "huge number": lambda run: _result(run).write_text(_result(run).read_text().replace("[", "[1e400,", 1)),
    "wrong types": lambda run: _result(run).write_text('{"ttfts": "all", "duration": []}'),
    "no result": lambda run: _result(run).unlink(),
    "torn end": lambda run: run.point(FIRST).done.write_text("{"),
    "foreign end": lambda run: run.point(FIRST).done.write_text('{"schema": 9}'),
    "torn point": lambda run: run.point(FIRST).job.write_text('{"schema": 1'),
    "torn versions": lambda run: next(run.point(FIRST).path.glob("attempts/*/versions.json")).write_text("[" * 9999),
    "torn journal": lambda run: run.journal.write_text("not a line\n"),
    "an end elsewhere": lambda run: _elsewhere(run),
}  # fmt: skip


def _result(run: RunFolder) -> Path:
    return next(iter(sorted(run.point(FIRST).path.glob("attempts/*/leg-1-*/result.json"))))


def _elsewhere(run: RunFolder) -> None:
    done = run.read_done(FIRST)
    assert done is not None
    legs = [done.legs[0].model_copy(update={"folder": "../../../.."}), *done.legs[1:]]
    write_model(run.point(FIRST).done, done.model_copy(update={"legs": tuple(legs)}))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_said_and_costs_no_other_point(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, pairs=2)
    DAMAGE[name](run)
    record = collect(run)
    page = serve_page(record, 1.8e9)
    assert str(tmp_path) not in page
    assert "<script" not in page
    others = [point for point in record.points if point.name != FIRST]
    assert all(len(list(point.measured)) == 4 for point in others)
    assert len(aggregates(record)) >= 10
    told = [record.points[0].reason, *(leg.fault for leg in record.points[0].legs), *record.faults]
    assert any(told), name
    result = cli("report", str(tmp_path))
    assert result.exit_code == (0 if name in ("torn point", "torn versions") else 1), result.output
    assert "a bug of epfuse" not in result.stderr


def test_points_that_did_not_end_well_have_no_aggregate_and_their_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path, pairs=2)
    done = run.read_done(FIRST)
    assert done is not None
    gated = done.legs[1].model_copy(update={"state": End.GATED_OUT, "reason": "answers differ by 3 nats"})
    update = {"state": End.GATED_OUT, "reason": "=answers differ", "legs": (done.legs[0], gated)}
    write_model(run.point(FIRST).done, done.model_copy(update=update))
    run.point(LAST).done.unlink()
    record = collect(run)
    assert not record.ok
    assert [record.points[n].state for n in (0, 5)] == ["gated_out", "planned"]
    assert {name for name in aggregates(record) if "1k1k-c1-" in name} == {f"agg_{FIRST}_baseline.json"}
    assert record.verdicts[FIRST].word is Word.FEW
    rows = list(csv.DictReader(io.StringIO(table(record))))
    assert rows[0]["reason"].startswith("'=")  # no formula for a spreadsheet
    page = serve_page(record, 1.8e9)
    assert "answers differ by 3 nats" in page
    assert "not every point is done" in page
