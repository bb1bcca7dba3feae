"""SGLang's server settings: what the user wrote, and what SGLang made of it."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.runtime_context import get_server_args


def setting(name: str) -> Any:
    """A server argument as SGLang resolved it; None for one that this SGLang does not have."""
    return resolution_result(get_server_args(), name)


def written(name: str) -> Any:
    """A server argument as the user gave it, or its default; None for one that this SGLang does not have."""
    return getattr(get_server_args(), name, None)


def most_tokens() -> int | None:
    """The most tokens of a layer's call while serving; None where SGLang has not said.

    Prefill is cut into chunks, of which dynamic chunking may make longer ones, and decode tokens that are mixed into a
    chunk are part of it. A decode step has some tokens of each running request where they are guessed ahead. Data
    parallel ranks of attention gather what each of them has.
    """
    chunk = setting("chunked_prefill_size")
    if chunk is None:
        return None
    if chunk <= 0:  # no chunks: one request may be longer than a whole batch of several
        prefill = max(int(setting("max_prefill_tokens") or 0), int(setting("context_length") or 0))
    else:
        prefill = int(chunk * 5 / 4) if setting("enable_dynamic_chunking") else int(chunk)
    decode = getattr(setting("cuda_graph_config"), "decode", None)
    requests = max(int(setting("max_running_requests") or 0), int(getattr(decode, "max_bs", None) or 0))
    guessed = int(setting("speculative_num_draft_tokens") or 1)
    return int(setting("attn_dp_size") or 1) * max(prefill, requests * guessed)
