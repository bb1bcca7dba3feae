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


# vLLM: "execute_context_3(640)_generation_2(2)": requests (tokens), in prefill and in decode.
VLLM = re.compile(r"^execute_context_(\d{1,9})\((\d{1,9})\)_generation_(\d{1,9})\((\d{1,9})\)$")
# vLLM with detailed annotations: "execute_32_context_0(sq0sk0...)_generation_32(sq32sk55086...)": sq sums up the
# queries' lengths, hence the tokens, and sk the keys'; their products follow.
VLLM_DETAILED = re.compile(
    r"^execute_\d{1,9}_context_(\d{1,9})\(sq(\d{1,9})sk\d+[^)]*\)_generation_(\d{1,9})\(sq(\d{1,9})sk\d+[^)]*\)$"
)
# SGLang: "step[DECODE bs=4]", "step[EXTEND bs=2 toks=107]", "step[MIXED bs=2]".
SGLANG = re.compile(r"^step\[(\w+) bs=(\d{1,9})(?: toks=(\d{1,9}))?[^\]]*\]$")
SGLANG_KINDS = {"DECODE": StepKind.DECODE, "EXTEND": StepKind.PREFILL, "MIXED": StepKind.MIXED}
# torch.profiler with a schedule.
PROFILER_STEP = re.compile(r"^ProfilerStep#\d+$")


def parse_label(text: str) -> StepLabel | None:
    """What an annotation says of a step; None if it is not one of a server."""
    if match := VLLM.match(text) or VLLM_DETAILED.match(text):
        contexts, context_tokens, generations, generation_tokens = map(int, match.groups())
        kinds = {(True, False): StepKind.PREFILL, (False, True): StepKind.DECODE, (True, True): StepKind.MIXED}
        kind = kinds.get((contexts > 0, generations > 0), StepKind.UNKNOWN)
        return StepLabel(text, kind, contexts + generations, context_tokens + generation_tokens)
    if match := SGLANG.match(text):
        kind = SGLANG_KINDS.get(match[1], StepKind.UNKNOWN)
        requests = int(match[2])
        tokens = int(match[3]) if match[3] else requests if kind is StepKind.DECODE else None
        return StepLabel(text, kind, requests, tokens)
    if PROFILER_STEP.match(text):
        return StepLabel(text, StepKind.UNKNOWN)
    return None
