from __future__ import annotations

import pytest

from epfuse.profiling.annotations import StepKind, parse_label


@pytest.mark.parametrize(
    ("text", "kind", "requests", "tokens"),
    [
        ("execute_context_0(0)_generation_32(32)", StepKind.DECODE, 32, 32),
        ("execute_context_3(640)_generation_0(0)", StepKind.PREFILL, 3, 640),
        ("execute_context_1(100)_generation_7(14)", StepKind.MIXED, 8, 114),
        ("execute_context_0(0)_generation_0(0)", StepKind.UNKNOWN, 0, 0),
        (
            "execute_32_context_0(sq0sk0sqsq0sqsk0)_generation_32(sq32sk55086sqsq32sqsk55086)",
            StepKind.DECODE,
            32,
            32,
        ),
        ("execute_9_context_3(sq128sk256sqsq1sqsk1)_generation_2(sq2sk300sqsq1sqsk1)", StepKind.MIXED, 5, 130),
        ("step[DECODE bs=4]", StepKind.DECODE, 4, 4),
        ("step[EXTEND bs=2 toks=107]", StepKind.PREFILL, 2, 107),
        ("step[MIXED bs=2]", StepKind.MIXED, 2, None),
        ("step[IDLE bs=0]", StepKind.UNKNOWN, 0, None),
        ("step[MIXED bs=5 c=2 c_sq=300 g=3 g_sq=3]", StepKind.MIXED, 5, 303),
        ("step[DECODE bs=4 g_sq=8]", StepKind.DECODE, 4, 8),
        ("decode[bs=117/128 tok=117 d=117]", StepKind.DECODE, 117, 117),
        ("prefill[bs=2 tok=900 p=2]", StepKind.PREFILL, 2, 900),
        ("execute_context_1(888_788544)_generation_0(0_0)", StepKind.PREFILL, 1, 888),
        ("execute_context_1(888_788544)_generation_3(3_3)", StepKind.MIXED, 4, 891),
        ("ProfilerStep#12", StepKind.UNKNOWN, None, None),
    ],
)
def test_what_servers_write(text: str, kind: StepKind, requests: int | None, tokens: int | None) -> None:
    label = parse_label(text)
    assert label is not None
    assert (label.kind, label.requests, label.tokens, label.text) == (kind, requests, tokens, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epfuse::route",
        "execute_context_1",
        "execute_context_1(1)_generation_1(1)x",
        "step[DECODE]",
        "step[MIXED tok=3]",
        "decode[bs=x]",
        "decode[bs=1] and more",
        "ProfilerStep#1\n",
        "execute_context_1(99999999999999999999)_generation_1(1)",
    ],
)
def test_what_is_no_step(text: str) -> None:
    assert parse_label(text) is None
