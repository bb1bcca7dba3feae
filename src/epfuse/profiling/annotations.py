"""What servers write into a trace about a step: which requests and tokens it ran."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class StepKind(enum.Enum):
    """What a step computes."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class StepLabel:
    """An annotation that was understood.

    Attributes:
        text: the annotation.
        kind: of the step.
        requests: in the batch; None if it does not say.
        tokens: that the model runs on; None if it does not say.
    """

    text: str
    kind: StepKind
    requests: int | None = None
    tokens: int | None = None


# vLLM: "execute_context_3(640)_generation_2(2)": requests (tokens), in prefill and in decode. A later form adds the sum
# of their squares: "execute_context_1(888_788544)_generation_0(0_0)".
VLLM = re.compile(r"execute_context_(\d{1,9})\((\d{1,9})(?:_\d+)*\)_generation_(\d{1,9})\((\d{1,9})(?:_\d+)*\)")
# vLLM with detailed annotations: "execute_32_context_0(sq0sk0...)_generation_32(sq32sk55086...)": sq sums up the
# queries' lengths, hence the tokens, and sk the keys'; their products follow.
VLLM_DETAILED = re.compile(
    r"execute_\d{1,9}_context_(\d{1,9})\(sq(\d{1,9})sk\d+[^)]*\)_generation_(\d{1,9})\(sq(\d{1,9})sk\d+[^)]*\)"
)
# SGLang and its relatives: "step[DECODE bs=4]", "step[EXTEND bs=2 toks=107]", "step[MIXED bs=5 c_sq=300 g_sq=3]",
# "decode[bs=117/128 tok=117 d=117]": requests (of the padded batch), tokens, or the queries of prefill and of decode.
BRACKETS = re.compile(r"(?:step\[(\w{1,20}) |(decode|prefill|extend|mixed|idle)\[)([^\]]{1,400})\]", re.IGNORECASE)
FIELD = re.compile(r"(\w{1,20})=(\d{1,9})(?:/\d{1,9})?")
KINDS = {
    "decode": StepKind.DECODE,
    "extend": StepKind.PREFILL,
    "prefill": StepKind.PREFILL,
    "mixed": StepKind.MIXED,
}
# torch.profiler with a schedule.
PROFILER_STEP = re.compile(r"ProfilerStep#\d+")


def parse_label(text: str) -> StepLabel | None:
    """What an annotation says of a step; None if it is not one of a server."""
    if match := VLLM.fullmatch(text) or VLLM_DETAILED.fullmatch(text):
        contexts, context_tokens, generations, generation_tokens = map(int, match.groups())
        kinds = {(True, False): StepKind.PREFILL, (False, True): StepKind.DECODE, (True, True): StepKind.MIXED}
        kind = kinds.get((contexts > 0, generations > 0), StepKind.UNKNOWN)
        return StepLabel(text, kind, contexts + generations, context_tokens + generation_tokens)
    if match := BRACKETS.fullmatch(text):
        return _in_brackets(text, match[1] or match[2], match[3])
    if PROFILER_STEP.fullmatch(text):
        return StepLabel(text, StepKind.UNKNOWN)
    return None


def _in_brackets(text: str, word: str, content: str) -> StepLabel | None:
    fields: dict[str, int] = {}
    for field in content.split():
        if match := FIELD.fullmatch(field):
            fields.setdefault(match[1], int(match[2]))
    if "bs" not in fields:
        return None
    kind = KINDS.get(word.lower(), StepKind.UNKNOWN)
    tokens = fields.get("toks", fields.get("tok"))
    if tokens is None and (queries := [fields[name] for name in ("c_sq", "g_sq") if name in fields]):
        tokens = sum(queries)
    if tokens is None and kind is StepKind.DECODE:
        tokens = fields["bs"]
    return StepLabel(text, kind, fields["bs"], tokens)
