"""The matrix: each test is a rule of InferenceX' fixed-seq-len configurations."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from epfuse.errors import ConfigError
from epfuse.serving.entries import Entry, MultiNodeEntry, Runners
from epfuse.serving.matrix import (
    MatrixRow,
    Selection,
    expand,
    mark_evals,
    only_evals,
    select_keys,
    sweep_runners,
)
from epfuse.serving.recipe import MatrixEntry

MI300X = ("mi300x-amds-0", "mi300x-amds-1", "mi300x-tw-0")
RUNNERS: Runners = {"mi300x": MI300X, "h200": ("h200-nb-0",), "gb200": ("g",)}
ALL = Selection()
WORKER = {"num-worker": 1, "tp": 4, "ep": 4, "dp-attn": True}


def entry(*searches: dict[str, Any], isl: int = 1024, osl: int = 1024, **changes: Any) -> dict[str, Any]:
    found = {
        "image": "vllm:1",
        "model": "org/m3",
        "model-prefix": "m3",
        "precision": "fp8",
        "framework": "vllm",
        "runner": "mi300x",
        "multinode": False,
        "seq-len-configs": [{"isl": isl, "osl": osl, "search-space": list(searches) or [{"tp": 8, "conc-list": [4]}]}],
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


def multi(**changes: Any) -> dict[str, Any]:
    search = {"prefill": WORKER, "decode": WORKER | {"tp": 8}, "conc-list": [1, 8, 64]}
    return entry(search, multinode=True, disagg=True, runner="gb200", **changes)


def read(found: dict[str, Any]) -> Entry | MultiNodeEntry:
    return TypeAdapter(MatrixEntry).validate_python(found)


def rows(*searches: dict[str, Any], select: Selection = ALL, **changes: Any) -> list[MatrixRow]:
    return expand({"m3": read(entry(*searches, **changes))}, RUNNERS, select)


def concurrencies(found: list[MatrixRow]) -> list[Any]:
    return [row.conc for row in found]


# ---- what may stand in it


@pytest.mark.parametrize("level", ["entry", "lengths", "search", "worker"])
def test_extra_keys_are_refused(level: str) -> None:
    found = multi()
    lengths = found["seq-len-configs"][0]
    search = lengths["search-space"][0]
    {"entry": found, "lengths": lengths, "search": search, "worker": search["prefill"] | {}}[level]["extra"] = 1
    if level == "worker":
        search["prefill"] = WORKER | {"extra": 1}
    with pytest.raises(ValidationError, match="extra"):
        read(found)


def test_names_are_in_kebab_case() -> None:
    found = entry()
    found["model_prefix"] = found.pop("model-prefix")
    with pytest.raises(ValidationError, match="model-prefix"):
        read(found)


@pytest.mark.parametrize("key", ["image", "model", "model-prefix", "precision", "framework", "runner"])
def test_all_of_an_entry_is_required(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        read(entry(**{key: None}))


@pytest.mark.parametrize("spec", ["mtp", "draft_model", "none"])
def test_spec_decoding_is_one_of_three(spec: str) -> None:
    assert rows({"tp": 8, "conc-list": [4], "spec-decoding": spec})[0].spec_decoding == spec
    with pytest.raises(ValidationError, match="spec-decoding"):
        read(entry({"tp": 8, "conc-list": [4], "spec-decoding": "eagle"}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "either conc-start and conc-end or conc-list"),
        ({"conc-list": [1], "conc-start": 1, "conc-end": 2}, "either conc-start and conc-end or conc-list"),
        ({"conc-start": 1}, "come together"),
        ({"conc-end": 1}, "come together"),
        ({"conc-list": [1], "conc-end": 2}, "come together"),
        ({"conc-list": []}, "conc-list"),
        ({"conc-start": 8, "conc-end": 4}, "at most conc-end"),
        ({"conc-start": 0, "conc-end": 4}, "conc-start"),
        ({"conc-list": [4, 0]}, "conc-list"),
        ({"conc-list": [4, -1]}, "conc-list"),
        ({"conc-list": [True]}, "conc-list"),
        ({"conc-list": ["4"]}, "conc-list"),
        ({"conc-list": [4.5]}, "conc-list"),
    ],
)
def test_concurrency_is_a_range_or_a_list_never_both_or_neither_and_positive(given: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        read(entry({"tp": 8} | given))


def test_concurrency_of_one_node_is_an_int_or_a_list() -> None:
    assert concurrencies(rows({"tp": 8, "conc-list": 16})) == [16]
    assert concurrencies(rows({"tp": 8, "conc-list": [16, 32]})) == [16, 32]


def test_one_node_does_not_disaggregate() -> None:
    with pytest.raises(ValidationError, match="disagg"):
        read(entry(disagg=True))


def test_several_nodes_need_prefill_and_decode_and_have_a_list() -> None:
    (row,) = expand({"m3": read(multi())}, RUNNERS)
    assert (row.conc, row.tp) == ((1, 8, 64), None)
    for missing in ("prefill", "decode"):
        found = multi()
        del found["seq-len-configs"][0]["search-space"][0][missing]
        with pytest.raises(ValidationError, match=missing):
            read(found)


def test_multinode_fits_the_schema() -> None:
    with pytest.raises(ValidationError, match="prefill"):
        read(entry(multinode=True))
    with pytest.raises(ValidationError, match="tp"):
        read(multi() | {"multinode": False, "disagg": False})


@pytest.mark.parametrize("found", [{"mi300x": []}, {"mi300x": "node"}, {"mi300x": [1]}, {"mi300x": None}])
def test_runners_are_non_empty_lists_of_strings(found: dict[str, Any]) -> None:
    class File(BaseModel):
        runners: Runners

    with pytest.raises(ValidationError, match="runners"):
        File(runners=found)


# ---- expansion


@pytest.mark.parametrize(
    ("start", "end", "step", "found"),
    [
        (1, 256, 2, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        (4, 100, 2, [4, 8, 16, 32, 64, 100]),
        (1, 100, 10, [1, 10, 100]),
        (3, 3, 2, [3]),
        (5, 6, 2, [5, 6]),
    ],
)
def test_a_range_grows_by_the_step_and_always_has_its_end(start: int, end: int, step: int, found: list[int]) -> None:
    assert concurrencies(rows({"tp": 8, "conc-start": start, "conc-end": end}, select=Selection(step=step))) == found


def test_max_model_len_is_input_and_output_and_256() -> None:
    assert rows()[0].max_model_len == 2304
    assert rows(isl=8192)[0].max_model_len == 9472


@pytest.mark.parametrize(
    ("isl", "osl", "name"), [(1024, 1024, "m3_1k1k"), (8192, 1024, "m3_8k1k"), (1024, 8192, "m3_1024_8192")]
)
def test_a_name_is_prefix_and_short_lengths_or_the_numbers(isl: int, osl: int, name: str) -> None:
    assert rows(isl=isl, osl=osl)[0].name == name


def test_ep_is_1_and_attention_is_sliced_unless_given() -> None:
    assert (rows()[0].ep, rows()[0].dp_attn) == (1, False)
    (row,) = rows({"tp": 4, "ep": 4, "dp-attn": True, "conc-list": [1]})
    assert (row.tp, row.ep, row.dp_attn) == (4, 4, True)


# ---- filters


MATRIX = {
    "m3-fp8-mi300x-vllm": read(entry()),
    "m3-fp8-h200-vllm": read(entry(runner="h200")),
    "dsr1-fp4-h200-sglang": read(entry(runner="h200", precision="fp4", framework="sglang", isl=8192)),
    "dsr1-fp8-gb200-vllm": read(multi()),
}


def keys(**selection: Any) -> list[str]:
    return [row.key for row in expand(MATRIX, RUNNERS, Selection(**selection))]


def test_filters_by_prefix_precision_framework_runner_and_lengths() -> None:
    assert keys(prefixes=("m3",)) == ["m3-fp8-mi300x-vllm", "m3-fp8-h200-vllm"]
    assert keys(precisions=("fp4",)) == ["dsr1-fp4-h200-sglang"]
    assert keys(frameworks=("sglang", "trt")) == ["dsr1-fp4-h200-sglang"]
    assert keys(runners=("h200",)) == ["m3-fp8-h200-vllm", "dsr1-fp4-h200-sglang"]
    assert keys(lengths=("8k1k",)) == ["dsr1-fp4-h200-sglang"]
    assert keys(prefixes=("m3",), runners=("gb200",)) == []


def test_an_unknown_runner_type_is_an_error() -> None:
    with pytest.raises(ConfigError, match="runner is 'b200'"):
        keys(runners=("b200",))


def test_a_node_that_none_fits_is_skipped_and_several_give_one_row_each() -> None:
    found = expand(MATRIX, RUNNERS, Selection(node="amds"))
    assert [(row.key, row.node) for row in found] == [
        ("m3-fp8-mi300x-vllm", "mi300x-amds-0"),
        ("m3-fp8-mi300x-vllm", "mi300x-amds-1"),
    ]


def test_neither_single_nor_multi_asked_is_both() -> None:
    assert len(keys()) == len(keys(single_node=True, multi_node=True)) == 4
    assert keys(multi_node=True) == ["dsr1-fp8-gb200-vllm"]
    assert len(keys(single_node=True)) == 3


# ---- limits


def test_max_conc_below_all_gives_one_point_at_max_conc() -> None:
    range_ = {"tp": 8, "conc-start": 16, "conc-end": 64}
    assert concurrencies(rows(range_, select=Selection(max_conc=32))) == [16, 32]
    assert concurrencies(rows(range_, select=Selection(max_conc=8))) == [8]
    found = expand({"m3": read(multi())}, RUNNERS, Selection(max_conc=8))
    assert concurrencies(found) == [(1, 8)]


def test_max_tp_skips_and_max_ep_clamps() -> None:
    searches = {"tp": 8, "ep": 8, "conc-list": [1]}, {"tp": 4, "ep": 4, "conc-list": [1]}
    assert [row.tp for row in rows(*searches, select=Selection(max_tp=4))] == [4]
    assert [(row.tp, row.ep) for row in rows(*searches, select=Selection(max_ep=2))] == [(8, 2), (4, 2)]


@pytest.mark.parametrize("limit", [{"max_conc": 0}, {"max_tp": 0}, {"max_ep": -1}])
def test_a_limit_of_zero_or_less_skips(limit: dict[str, int]) -> None:
    assert keys(**limit) == []


# ---- runner sweep and globs


def test_a_runner_sweep_takes_the_highest_tp_and_its_lowest_concurrency_on_each_node() -> None:
    searches = {"tp": 4, "conc-list": [1]}, {"tp": 8, "conc-start": 16, "conc-end": 64}, {"tp": 8, "conc-list": [8]}
    found = sweep_runners({"m3": read(entry(*searches))}, RUNNERS, "mi300x")
    assert [(row.node, row.tp, row.conc) for row in found] == [(node, 8, 8) for node in MI300X]
    (row,) = sweep_runners({"m3": read(multi())}, RUNNERS, "gb200")
    assert row.conc == (1,)
    with pytest.raises(ConfigError, match="runner is 'x'"):
        sweep_runners(MATRIX, RUNNERS, "x")
    with pytest.raises(ConfigError, match="node is 'zz'"):
        sweep_runners(MATRIX, RUNNERS, "h200", Selection(node="zz"))


def test_globs_keep_the_order_have_no_doubles_and_must_fit() -> None:
    names = ["a-1", "b-1", "a-2", "a-10", "a.1"]
    assert select_keys(names, ["a-?", "a-*"]) == ["a-1", "a-2", "a-10"]
    assert select_keys(names, ["b-*", "*-1"]) == ["b-1", "a-1"]
    assert select_keys(names, ["a.1"]) == ["a.1"]
    for nothing in ("c*", "a-??1", "[ab]-1", "a"):
        with pytest.raises(ConfigError, match="fits none"):
            select_keys(names, ["a-1", nothing])


# ---- evals


def evaluated(*values: int, **changes: Any) -> list[Any]:
    return [row.conc for row in rows({"tp": 8, "conc-list": list(values)}, **({"isl": 8192} | changes)) if row.is_eval]


def test_evals_are_at_8k1k_only_and_from_concurrency_16() -> None:
    assert evaluated(64, isl=1024) == []
    assert evaluated(64, isl=8192, osl=8192) == []
    assert evaluated(1, 8, 15) == []
    assert evaluated(8, 16) == [16]


def test_evals_are_the_highest_and_the_median() -> None:
    assert evaluated(16, 32, 64, 128, 256) == [64, 256]
    assert evaluated(4, 16, 32, 64, 128) == [64, 128]  # of 16 32 64 128 number 4 // 2
    assert evaluated(16, 256) == [256]


def test_rows_that_are_only_for_evals_are_the_chosen_ones() -> None:
    found = rows({"tp": 8, "conc-list": [1, 16, 256]}, isl=8192)
    evals = only_evals(found)
    assert [(row.conc, row.eval_only) for row in evals] == [(256, True)]


def test_marking_evals_twice_changes_nothing() -> None:
    found = rows({"tp": 8, "conc-list": [16, 32, 64]}, isl=8192)
    assert mark_evals(found) == found
