"""docs/vllm.md: where the seconds of a first offline run go is what the record of its traces says."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
RECORD = json.loads((DOCS / "records/2026-11-30-h200-offline-trace.json").read_text())
SECTION = (DOCS / "vllm.md").read_text().partition("\n#### Offline\n")[2].partition("\n### ")[0]
ARMS = RECORD["arms"]
COMPILED = "kernel_unified_attention"


def steps(arm: dict, kind: str) -> dict:
    return next(row for row in arm["by_steps"] if row["steps"] == kind)


def row(words: str, values: list[list[float]], *, ratio: bool) -> str:
    """A line of the table: milliseconds as seconds, without epfuse and with it, and their ratios."""
    none, epfuse = ([value[arm] for value in values] for arm in (0, 1))
    shown = [", ".join(f"{value / 1e3:.2f}" for value in arm) for arm in (none, epfuse)]
    ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(none, epfuse, strict=True)) if ratio else ""
    return f"| {words} | {shown[0]} | {shown[1]} |{f' {ratios} ' if ratios else ' '}|"


def test_the_table_is_the_records() -> None:
    assert [arm["experts"] for arm in ARMS] == ["MarlinExperts", "EpfuseExperts"]
    of = {
        key: [arm[key] for arm in ARMS] for key in ("span_ms", "busy_ms", "experts_ms", "idle_ms", "compile_pause_ms")
    }
    first, prefill, decode = ([steps(arm, kind) for arm in ARMS] for kind in ("first", "prefill", "decode"))
    with_prompts = [a["experts_ms"] + b["experts_ms"] for a, b in zip(first, prefill, strict=True)]
    without = [each["experts_ms"] for each in decode]
    rest = [busy - experts for busy, experts in zip(of["busy_ms"], of["experts_ms"], strict=True)]
    begin = [each["idle_ms"] - pause for each, pause in zip(first, of["compile_pause_ms"], strict=True)]
    rows = [
        row("from the first step to the last kernel", [of["span_ms"]], ratio=True),
        row("GPU busy", [of["busy_ms"]], ratio=True),
        row("of it experts: 34 steps with prompts, 127 without", [with_prompts, without], ratio=True),
        row("of it everything else", [rest], ratio=True),
        row("GPU idle", [of["idle_ms"]], ratio=False),
        row("of it: one kernel of vLLM's is compiled in the first step", [of["compile_pause_ms"]], ratio=False),
        row("of it: the other 33 steps with prompts", [[each["idle_ms"] for each in prefill]], ratio=False),
        row("of it: 127 steps without", [[each["idle_ms"] for each in decode]], ratio=False),
        row("of it: the rest of the first step", [begin], ratio=False),
    ]
    assert [line for line in SECTION.splitlines() if line.startswith(("| from the first", "| GPU", "| of it"))] == rows


def test_the_parts_of_the_records_make_its_sums() -> None:
    for arm in ARMS:
        assert abs(arm["busy_ms"] + arm["idle_ms"] - arm["span_ms"]) < 0.15
        for key in ("busy_ms", "experts_ms", "idle_ms"):
            assert abs(sum(each[key] for each in arm["by_steps"]) - arm[key]) < 1, (arm["experts"], key)


def test_one_kernel_is_compiled_after_the_first_prompt_and_it_is_the_pause() -> None:
    compiles = [[each for each in arm["compiled"] if each["kernel"] == COMPILED] for arm in ARMS]
    for arm, own in zip(ARMS, compiles, strict=True):
        assert [each for each in arm["compiled"] if each["s"] > 0] == [own[-1]]
        assert 0 <= arm["compile_pause_ms"] - own[-1]["ms"] < 20
    took = [each["ms"] / 1e3 for own in compiles for each in own]
    words = " ".join(SECTION.split())
    assert len(took) == 12
    assert f"twelve compiles of this kernel, six in each arm, took {min(took):.2f} to {max(took):.2f} s" in words
    assert [len(arm["compiled"]) for arm in ARMS] == [15, 15]


def test_what_a_run_could_reach_is_worked_out_from_it() -> None:
    none, epfuse = ARMS
    pauses = [arm["compile_pause_ms"] for arm in ARMS]

    def ratio(compiling: float) -> float:
        a, b = (arm["span_ms"] - pause + compiling for arm, pause in zip(ARMS, pauses, strict=True))
        return a / b

    words = " ".join(SECTION.split())
    assert f"a later run would have {ratio(0):.2f} of Marlin's" in words
    assert f"a first one {ratio(max(pauses)):.2f} to {ratio(min(pauses)):.2f} if the compile takes both" in words
    assert f"a GPU that never waits {none['busy_ms'] / epfuse['busy_ms']:.2f}." in words
    waited = [arm["decode_512"]["waited"] for arm in ARMS]
    assert f"{waited[1]} of {none['decode_512']['steps']} such steps wait" in words
    assert f"and {waited[0]} without" in words
    assert {(arm["waits_in_logits"]["prefill_steps"], steps(arm, "prefill")["count"]) for arm in ARMS} == {(28, 33)}
    assert "in 28 of 33, in either arm" in words
