"""docs/performance.md against the records that its newest tables and pictures are from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tools.draw_peers import chart_of

DOCS = Path(__file__).parents[2] / "docs"
OURS = "epfuse `w8a16`"
RUNS = {
    "h100": ("Beside the fastest peers, in one run", "2026-11-26-h100-peers.json"),
    "h200": ("The same on an H200", "2026-12-01-h200-peers.json"),
}
PEERS = {
    "h100": {
        "vLLM Marlin, MXFP8, best tiles": "vllm_marlin_tuned",
        "humming 0.1.19 `w8a16`, grouped": "humming_w8a16_grouped",
        "humming 0.1.19 `w8a16`, indexed": "humming_w8a16_indexed",
        "triton_kernels, BF16 weights": "triton_kernels_bf16",
    },
    "h200": {
        "vLLM Marlin, MXFP8, best tiles": "vllm_marlin_tuned",
        "humming 0.1.20 `w8a16`, grouped": "humming_w8a16_grouped",
        "humming 0.1.20 `w8a16`, indexed": "humming_w8a16_indexed",
        "triton_kernels, BF16 weights": "triton_kernels_bf16",
    },
}
OTHERS = {
    "h100": {},
    "h200": {"epfuse `w8a8`": "impl_w8a8", "epfuse `bf16`": "impl_bf16", "epfuse `block_fp8`": "impl_block_fp8"},
}
"""Our rows beside the first."""
runs = pytest.mark.parametrize("run", RUNS)


def record_of(run: str) -> dict[str, Any]:
    return json.loads((DOCS / "records" / RUNS[run][1]).read_text())


def cells(run: str, label: str) -> list[float]:
    """The numbers of a row of the run's table."""
    section = (DOCS / "performance.md").read_text().split(f"## {RUNS[run][0]}\n")[1]
    line = next(line for line in section.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell) for cell in line.split("|")[2:-1]]


def over_peers(run: str, *, swept: bool = False) -> list[float]:
    """Our microseconds over the fastest peer's, by token count.

    Args:
        run: a key of `RUNS`.
        swept: also over the times of the peers' short sweeps.
    """
    record = record_of(run)
    ours = {row["T"]: row["us"] for row in record["rows"] if row["peer"] == "impl"}
    found: dict[int, list[float]] = {}
    for row in record["rows"]:
        if row["peer"] in PEERS[run].values() and (row["best"] or swept):
            times = [row["us"], *(us for us, _ in (row["sweep"] or {}).values())] if swept else [row["us"]]
            found.setdefault(row["T"], []).append(ours[row["T"]] / min(times))
    return [max(ratios) for _, ratios in sorted(found.items())]


def best(run: str, peer: str) -> list[float]:
    """Microseconds of a peer's best configurations, by token count."""
    rows = sorted(record_of(run)["rows"], key=lambda row: row["T"])
    return [row["us"] for row in rows if row["peer"] == peer and row["best"]]


@runs
def test_the_table_has_the_record_s_times(run: str) -> None:
    for label, peer in (PEERS[run] | OTHERS[run] | {OURS: "impl"}).items():
        assert cells(run, label) == [round(us, 1) for us in best(run, peer)], label


def test_readme_has_the_range_of_the_h200_s_ratios() -> None:
    ratios = over_peers("h200")
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"`w8a16` took {min(ratios):.2f} to {max(ratios):.2f} of the time of the fastest of them" in words


@runs
def test_the_table_has_the_record_s_ratios(run: str) -> None:
    ours = best(run, "impl")
    assert {row["peer"] for row in record_of(run)["rows"]} == {"impl", *PEERS[run].values(), *OTHERS[run].values()}
    assert cells(run, "over the fastest peer") == pytest.approx(over_peers(run), abs=0.0051)
    curves = chart_of(record_of(run)).curves
    floors = {point.x: point.y for curve in curves if curve.is_floor for point in curve.points}
    for shown, us, floor in zip(cells(run, "over the floor of this run"), ours, floors.values(), strict=True):
        assert shown == pytest.approx(us / floor, abs=0.0051)


def test_the_h200_s_table_says_which_marks_are_missed() -> None:
    for prefix, peer, over in (("", "impl", "over the mark"), ("`w8a8` ", "impl_w8a8", "`w8a8` over its mark")):
        marks = cells("h200", f"{prefix}mark, us")
        ratios = [us / mark for us, mark in zip(best("h200", peer), marks, strict=True)]
        assert cells("h200", over) == pytest.approx(ratios, abs=0.0051)


def test_the_h200_s_table_has_another_card_the_peers_sweeps_and_w8a8_beside_the_peers() -> None:
    other = json.loads((DOCS / "records/2026-12-01-h200-three-runs.json").read_text())["runs"][1]["impl_us"]
    assert cells("h200", f"{OURS}, another card") == [round(us, 1) for us in other.values()]
    assert cells("h200", "over the peers' short sweep") == pytest.approx(over_peers("h200", swept=True), abs=0.0051)
    ours = zip(best("h200", "impl_w8a8"), best("h200", "impl"), over_peers("h200"), strict=True)
    wanted = [w8a8 / w8a16 * ratio for w8a8, w8a16, ratio in ours]
    assert cells("h200", "`w8a8` over the fastest peer") == pytest.approx(wanted, abs=0.0051)


@runs
def test_the_picture_is_the_record_s(run: str) -> None:
    pytest.importorskip("jinja2")
    from epfuse.bench.page import chart_svg

    assert (DOCS / f"performance-{run}.svg").read_text() == chart_svg(chart_of(record_of(run)))


@runs
def test_fp8_products_have_their_record_s_times(run: str) -> None:
    record = json.loads((DOCS / f"records/2026-11-26-{run}-w8a8.json").read_text())
    assert record["ok"]
    assert record["complete"]
    section = (DOCS / "performance.md").read_text().split("## `w8a8`: FP8 products on Hopper\n")[1]
    tables = [part for part in section.split("\n\n") if part.startswith("| tokens |")]
    tokens, *lines = [line.split("|")[1:-1] for line in tables[list(RUNS).index(run)].splitlines() if "---" not in line]
    shown = {line[0].strip(): [float(cell) for cell in line[1:]] for line in lines}
    rows = {(row["contender"], row["tokens"]): row for row in record["rows"]}
    for path in ("w8a16", "w8a8"):
        times = [rows[path, int(count)]["time"]["median_us"] for count in tokens[1:]]
        assert shown[f"`{path}`, us"] == [round(time, 1) for time in times]
    ratios = [
        rows["w8a16", int(count)]["time"]["median_us"] / rows["w8a8", int(count)]["time"]["median_us"]
        for count in tokens[1:]
    ]
    assert shown["`w8a16` over `w8a8`"] == pytest.approx(ratios, abs=0.0051)
    floors = [rows["w8a8", int(count)]["over_floor"] for count in tokens[1:]]
    assert shown["`w8a8` over its floor"] == pytest.approx(floors, abs=0.0051)


def test_few_tokens_have_their_record_s_times() -> None:
    rows = json.loads((DOCS / "records/2026-11-30-h200-w8a8-small.json").read_text())["rows"]
    table = (DOCS / "performance.md").read_text().split("**Few tokens.**")[1].split("\n\n")[1]
    tokens, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    kinds = {
        "`w8a16`": lambda row: row["path"] == "w8a16",
        "`w8a8`, tiles of 192 rows": lambda row: row["tiles"].startswith("16/192x128.g0.4w.5s"),
        "`w8a8`, tiles of 128 rows": lambda row: row["tiles"].startswith(
            f"16/128x128.g0.4w.{8 if row['tokens'] >= 16 else 6}s"
        ),
        "`w8a8`, BF16 activations": lambda row: row["path"] == "w8a8" and row["activations"] == "BF16",
    }
    for label, *shown in lines[:-1]:
        for count, cell in zip(tokens[1:], shown, strict=True):
            assert float(cell) == min(row["us"] for row in rows if row["tokens"] == int(count) and kinds[label](row))
    for count, cell in zip(tokens[1:], lines[-1][1:], strict=True):
        assert {float(cell)} == {
            row["floor_us"] for row in rows if row["tokens"] == int(count) and row["path"] == "w8a8"
        }


def test_the_other_layers_have_their_record_s_times() -> None:
    """Each cell is our time and, in brackets, the ratio to the fastest peer."""
    layers = json.loads((DOCS / "records/2026-11-26-h100-other-layers.json").read_text())["layers"]
    section = (DOCS / "performance.md").read_text().split("## Other layers, and skewed routing, beside peers\n")[1]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1 : 1 + len(layers)]
    for line, layer in zip(lines, layers, strict=True):
        assert layer["name"].split()[-1] in line
        shown = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        for cell, tokens in zip(shown, (1, 16, 256, 2048), strict=True):
            times = {row["peer"]: row["us"] for row in layer["rows"] if row["T"] == tokens}
            ours = times.pop("impl", None)
            assert cell == (f"{ours:.1f} ({ours / min(times.values()):.2f})" if ours else "none"), (
                layer["name"],
                tokens,
            )


def test_host_times_are_the_record_s() -> None:
    record = json.loads((DOCS / "records/2026-11-30-h200-host-time.json").read_text())
    section = (DOCS / "performance.md").read_text().split("## Host time of an eager call\n")[1]
    shown = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| `")]
    ours, theirs = ([row for row in record["rows"] if row["version"] == version] for version in ("this", "c8dab68"))
    for line, one, other in zip(shown, ours, theirs, strict=True):
        cells = [f"`{one['path']}`", one["tokens"], one["memory"], f"{one['us']:.0f}", f"{other['us']:.0f}"]
        cells += [f"{one['us'] / other['us']:.2f}", one["python_calls"], other["python_calls"]]
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [str(cell) for cell in cells]


def test_block_fp8_on_hopper_has_its_record_s_times() -> None:
    record = json.loads((DOCS / "records/2026-11-30-h200-block-fp8.json").read_text())
    section = (DOCS / "performance.md").read_text().split("## `block_fp8` on Hopper\n")[1]
    table = next(part for part in section.split("\n\n") if part.startswith("| tokens |"))
    tokens, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len(lines) == len(record["layers"]) == 3
    for line, rows in zip(lines, record["layers"].values(), strict=True):
        assert [int(count) for count in tokens[1:]] == [row["tokens"] for row in rows]
        assert line[1:] == [f"{row['portable_us']:.1f} -> {row['us']:.1f}" for row in rows]


def test_few_rows_are_their_record_s() -> None:
    records = ("2026-11-30-h200-few-rows.json", "2026-11-30-h200-few-rows-second.json")
    points = [point for name in records for point in json.loads((DOCS / "records" / name).read_text())["points"]]
    section = (DOCS / "performance.md").read_text().split("### Few rows an expert\n")[1].split("\n### ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\| [\w.-]+ [TE]P\d+ ", line)]
    assert len(lines) == len(points) == 29
    for name, tokens, active, before, now, ratio in lines:
        layer = name.lower().replace(" ", "-")
        found = [point for point in points if (point["layer"], point["tokens"]) == (layer, int(tokens))]
        (point,) = [point for point in found if before == f"{point['again_us'][point['today']]:.1f}"]
        assert float(active) == pytest.approx(sum(point["active"]) / len(point["active"]), abs=0.051)
        assert now in {f"{us:.1f}" for us in point["again_us"].values()}
        assert float(ratio) == round(float(now) / float(before), 2)


def test_one_wide_expert_has_its_record_s_times() -> None:
    points = json.loads((DOCS / "records/2026-11-30-h200-one-expert.json").read_text())["points"]
    section = (DOCS / "performance.md").read_text().split("### One expert or two\n")[1].split("\n### ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| Mixtral")]
    lines = [line for line in lines if len(line) == 5]  # the other table is that of many rows
    found = {(point["layer"], point["tokens"]): point for point in points}
    assert len(lines) == len(found) == 18
    for name, tokens, before, now, ratio in lines:
        point = found[name.lower().replace(" ", "-"), int(tokens)]
        times = point["again_us"]
        assert (before, now) == (f"{times[point['today']]:.1f}", f"{min(times.values()):.1f}")
        assert float(ratio) == round(float(now) / float(before), 2)


def test_tuned_rows_of_64_experts_are_their_record_s() -> None:
    (run,) = json.loads((DOCS / "records/2026-11-30-h200-tune64.json").read_text())["runs"]
    lines = (DOCS / "performance.md").read_text().splitlines()
    shown = next(line for line in lines if line.startswith("| MiniMax-M3 EP2 ")).split("|")[2:-1]
    for cell, point in zip(shown, run["points"], strict=True):
        times = dict.fromkeys(f"{point[key]:.1f}" for key in ("before_us", "after_us"))
        assert cell.strip() == " -> ".join(times)
    left = [point["untried"] for point in run["points"]]
    assert f"left {min(left)} to {max(left)} candidates" in "\n".join(lines)


def check_beside(section: str, record: str, peer: str) -> list[float]:
    """A table of the peer's times, and of each path its times and ratios, run after run; all ratios."""
    table = next(part for part in section.split("\n\n") if part.startswith("| tokens |"))
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    lines = [line for line in lines if line[0] != "over the floor"]
    expected: list[tuple[str, list[float]]] = []
    ratios: list[float] = []
    for run in json.loads((DOCS / f"records/{record}.json").read_text())["runs"]:
        assert run["ok"]
        assert run["complete"]
        times: dict[str, list[float]] = {}
        for row in run["rows"]:
            times.setdefault(row["contender"], []).append(row["time"]["median_us"])
        assert [row["tokens"] for row in run["rows"] if row["contender"] == peer] == list(map(int, head[1:]))
        expected.append((peer, times[peer]))
        for path in ("bf16", "block_fp8", "w8a8"):
            if path in times:
                over = [us / other for us, other in zip(times[path], times[peer], strict=True)]
                expected += [(f"epfuse `{path}`", times[path]), (f"over {peer}", over)]
                ratios += over if path != "w8a8" else []
    for (label, *shown), (name, numbers) in zip(lines, expected, strict=True):
        assert name in label
        assert list(map(float, shown)) == pytest.approx(numbers, abs=0.0051 if "over" in name else 0.0501)
    return ratios


def test_block_fp8_and_w8a8_beside_deepgemm_have_their_record_s_times() -> None:
    section = (DOCS / "performance.md").read_text().split("### Beside DeepGEMM\n")[1].split("\n## ")[0]
    ratios = check_beside(section, "2026-11-30-h200-deepgemm", "DeepGEMM")
    lost = [f"{100 * ratio - 100:.0f} %" for ratio in ratios if ratio > 1]
    assert lost == ["3 %", "2 %"]
    words = " ".join(section.split())
    assert "3 % slower at one token of MiniMax-M3 and 2 % of DeepSeek-V3" in words
    few = json.loads((DOCS / "records/2026-11-30-h200-block-fp8-few.json").read_text())
    beside = section.split("`--tokens 1,2,4`")[1]
    assert max(check_beside(beside, "2026-12-01-h200-deepgemm-few", "DeepGEMM")) < 1
    new = "8/128x128.g0.4w.3s.split_k=4/128x128.g0.4w.3s.split_k=4"
    for point in few["old_and_new"]["points"]:
        times = point["scan_us"] | point["finals_us"]
        old = times[few["old_and_new"]["old"]]
        if point["tokens"] <= 4 and new in times:
            assert f"{old:.1f} -> {times[new]:.1f} ({times[new] / old:.2f})" in section


def test_bf16_beside_flashinfer_has_its_record_s_times() -> None:
    section = (DOCS / "performance.md").read_text().split("**Beside FlashInfer.**")[1]
    assert max(check_beside(section, "2026-11-30-h200-flashinfer", "FlashInfer")) < 1
    check_floors_and_errors(section, "2026-11-30-h200-flashinfer", "less: {} to {} against float64")


def test_bf16_beside_flashinfer_on_other_layers_has_its_record_s_times() -> None:
    section = (DOCS / "performance.md").read_text().split("**Two other layers beside FlashInfer**")[1]
    ratios = check_beside(section, "2026-11-30-h200-flashinfer-others", "FlashInfer")
    words = " ".join(section.split())
    lost = [f"{100 * ratio - 100:.0f}" for ratio in ratios if ratio > 1]
    assert lost == ["7", "6", "6", "10"]
    assert "at four of these 14 points: by 7 % on Qwen3-235B at 8192 tokens, by 6, 6 and 10 % on Mixtral" in words
    won = [f"{ratio:.2f}"[1:] for ratio in sorted(ratios) if ratio < 1]
    assert len(won) == 10
    assert f"at the other ten, with {won[0]} to {won[-1]}" in words
    check_floors_and_errors(section, "2026-11-30-h200-flashinfer-others", "too: {} to {} against float64")


def check_floors_and_errors(section: str, record: str, theirs: str) -> None:
    """Ours over the floor, run after run, in the section's first table; both sides' errors in its sentences."""
    runs = json.loads((DOCS / f"records/{record}.json").read_text())["runs"]
    lines = [line for line in section.splitlines() if line.startswith("| over the floor |")]
    for run, line in zip(runs, lines, strict=False):  # other tables follow
        floors = [row["over_floor"] for row in run["rows"] if row["contender"] == "bf16"]
        assert [float(cell) for cell in line.split("|")[2:-1]] == pytest.approx(floors, abs=0.0051)
    for contender, words in (("FlashInfer", theirs), ("bf16", "ours {} to {}")):
        errors = [row["relative_error"] for run in runs for row in run["rows"] if row["contender"] == contender]
        ends = (f"{error:.1e}".replace("e-0", "e-") for error in (min(errors), max(errors)))
        assert words.format(*ends) in " ".join(section.split())


def test_the_tiles_of_many_rows_are_the_record_s() -> None:
    """Before and FlashInfer at each point; the best is one of the record's times, and the ratio is theirs."""
    names = {
        "Mixtral 8x7B EP2": "mixtral-8x7b-ep2",
        "Qwen3-235B EP8": "qwen3-235b-ep8",
        "Qwen3-235B EP4": "qwen3-235b-ep4",
        "MiniMax-M3 EP8": "minimax-m3-ep8",
    }
    points = json.loads((DOCS / "records/2026-11-30-h200-bf16-many-rows.json").read_text())["points"]
    times = {(point["layer"], point["tokens"]): point["us"] for point in points}
    section = (DOCS / "performance.md").read_text().split("**Tiles for many rows, searched beside FlashInfer**")[1]
    table = section.split("**Still slower")[0].splitlines()
    lines = [line.split(" | ") for line in table if line.startswith(tuple(f"| {name}" for name in names))]
    assert len(lines) == len(points)
    for layer, tokens, _, before, best, _, peer, ratio in lines:
        us = times.pop((names[layer.strip("| ")], int(tokens)))
        assert [float(before), float(peer)] == [round(us["today"], 1), round(us["FlashInfer"], 1)]
        ours = [time for word, time in us.items() if word != "FlashInfer" and abs(time - float(best)) < 0.051]
        assert ours, (layer, tokens)
        assert float(ratio.strip("| ")) == round(ours[0] / us["FlashInfer"], 2)
    assert not times


def test_tiles_beside_the_whole_space_are_their_record_s() -> None:
    points = json.loads((DOCS / "records/2026-12-01-h200-choice.json").read_text())["points"]
    table = (DOCS / "policy.md").read_text().split("Beside the whole space, with the fit of")[1].split("| tokens |")[1]
    lines = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[2:]]
    shown = {int(tokens): (us, best, over) for tokens, us, best, over in lines}
    wanted = {p["tokens"]: (f"{p['us']:.1f}", f"{p['best_us']:.1f}", f"{p['over_best']:.2f}") for p in points}
    assert shown == wanted


def test_many_rows_are_their_record_s() -> None:
    names = {
        "Mixtral-8x22B EP8", "Mixtral-8x7B EP8", "Mixtral-8x7B EP4", "MiniMax-M3 EP8", "MiniMax-M3 TP8",
        "Qwen3-235B EP8", "DeepSeek-V3 EP16", "gpt-oss-120b EP4",
    }  # fmt: skip
    points = json.loads((DOCS / "records/2026-12-01-h200-many-rows.json").read_text())["points"]
    wanted = {(point["layer"], point["tokens"]): point for point in points}
    text = (DOCS / "performance.md").read_text()
    sections = text.split("### One expert or two\n")[1].split("\n### Where the time")[0]
    lines = re.findall(
        r"^\| ([\w. -]+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", sections, re.M
    )
    for name, tokens, rows, before, now, ratio, block in lines:
        assert name in names
        point = wanted.pop((name.lower().replace(" ", "-"), int(tokens)))
        times, shape = point["again_us"], point["shape"]
        best = min(times, key=times.__getitem__)
        assert [float(before), float(now)] == [round(times[point["today"]], 1), round(times[best], 1)]
        assert float(ratio) == pytest.approx(times[best] / times[point["today"]], abs=0.0051)
        assert int(block) == int(best.split("/")[0])
        assert int(rows) == pytest.approx(point["tokens"] * shape["top_k"] / shape["experts"], abs=0.51)
    assert list(wanted) == [("minimax-m3-ep8", 22)]
    few = wanted["minimax-m3-ep8", 22]
    best_us = min(few["again_us"].values())
    assert f"got a row: {few['again_us'][few['today']]:.1f} -> {best_us:.1f}" in text


def test_the_time_model_s_errors_are_its_fit_s() -> None:
    """What `tools.fit_tiles` wrote beside the tables, in docs/policy.md."""
    fits = json.loads((DOCS.parent / "src/epfuse/measured/tables/sm_90/times.json").read_text())["fits"]
    text = (DOCS / "policy.md").read_text()
    assert len(fits) == 2
    for fit in fits:
        product = fit["device"].removesuffix(" 80GB HBM3")
        line = next(line for line in text.splitlines() if line.startswith(f"| {product} | {fit['points']} |"))
        errors = [f"{fit[name]:.1%}".replace("%", " %") for name in ("error", "error_other_shape")]
        assert line.strip("| ").split(" | ")[2:] == errors
        if product == "NVIDIA H200":
            assert f"which takes {fit['numbers']['sums']:.2f} us a MB" in " ".join(text.split())


def test_bursts_are_their_record_s() -> None:
    rows = json.loads((DOCS / "records/2026-11-30-h200-power.json").read_text())["rows"]
    section = (DOCS / "performance.md").read_text().split("**In bursts and at the power limit.**")[1]
    for row in rows:
        ratio = row["steady_us"] / row["burst_us"]
        assert f"| {row['tokens']} | {row['burst_us']:.1f} | {row['steady_us']:.1f} | {ratio:.2f} |" in section
