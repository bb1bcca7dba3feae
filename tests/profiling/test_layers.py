"""Layers by what repeats, whatever the kernels are called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse.profiling.events import Range, TracedKernel
from epfuse.profiling.layers import Layers, find_layers, find_skeleton
from epfuse.profiling.phases import Phase


def layers_of(
    names: list[str], streams: dict[str, int] | None = None, phases: dict[str, Phase] | None = None
) -> Layers:
    kernels = [
        TracedKernel(name, 0, (streams or {}).get(name, 7), 10 * i, 5 if name not in (streams or {}) else 1, None)
        for i, name in enumerate(names)
    ]
    return find_layers(kernels, [()] * len(kernels), [(phases or {}).get(name) for name in names])


def spans(layers: Layers) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in layers.spans]


@given(st.integers(2, 30), st.permutations("abcdef"), st.integers(0, 3), st.integers(0, 3))
def test_a_repeated_sequence(count: int, layer: list[str], head: int, tail: int) -> None:
    names = [f"head{i}" for i in range(head)] + layer * count + [f"tail{i}" for i in range(tail)]
    found = layers_of(names)
    assert spans(found) == [(head + 6 * i, head + 6 * i + 6) for i in range(count)]
    assert found.found_by == "repetition"


def test_layers_that_alternate_and_a_first_one_that_lacks_a_kernel() -> None:
    a, b = ["qkv", "rope", "local", "out", "moe"], ["cast", "qkv", "rope", "full", "reduce", "out", "moe"]
    names = ["embed", *a, *b, "cast", *a, *b, "logits"]
    found = layers_of(names)
    assert len(found.spans) == 4
    assert [names[span.start] for span in found.spans[1:]] == ["qkv", "qkv", "qkv"]
    assert found.position(0) == "head"
    assert found.position(len(names) - 1) == "tail"


def test_the_norm_before_the_first_layer_belongs_to_each_layer() -> None:
    names = ["embed", "first norm", *["qkv", "attention", "ffn", "norm"] * 4, "logits"]
    by_name = layers_of(names)
    by_phase = layers_of(names, phases={"first norm": Phase.NORM, "norm": Phase.NORM})
    assert spans(by_name)[0] == (2, 6)  # nothing tells that both norms are one thing
    assert spans(by_phase) == [(1, 5), (5, 9), (9, 13), (13, 17)]
    assert by_phase.position(17) == "tail"  # the final norm


def test_what_all_layers_end_with_belongs_to_the_last_one_too() -> None:
    names = ["norm", *["qkv", "ffn", "all-reduce", "norm"] * 3, "logits"]
    assert spans(layers_of(names)) == [(0, 4), (4, 8), (8, 12)]


def test_dense_layers_before_the_moe_ones_are_layers() -> None:
    dense = ["norm", "qkv", "attention", "out", "up", "down"]
    moe = ["norm", "qkv", "attention", "out", "route", "sort", "gemm1", "gemm2", "sum", "scale"]
    found = layers_of(["embed", *dense * 3, *moe * 9, "logits"])
    assert len(found.spans) == 12


def test_a_kernel_that_occurs_twice_a_layer_is_no_layer() -> None:
    layer = ["quant", "gemm", "rope", "attention", "quant", "gemm", "topk", "experts"]
    assert len(layers_of(layer * 6).spans) == 6


def test_the_shared_expert_on_its_own_stream() -> None:
    layer = ["qkv", "attention", "shared", "route", "experts"]
    found = layers_of(layer * 4, streams={"shared": 9})
    assert spans(found) == [(0, 5), (5, 10), (10, 15), (15, 20)]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a", "a"], ["a", "b", "b", "a"]])
def test_nothing_repeats(names: list[str]) -> None:
    found = layers_of(names)
    assert found == Layers()
    assert found.position(0) is None
    assert found.around(0) is None


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40))
def test_any_sequence_gives_spans_in_order(names: list[str]) -> None:
    found = layers_of(names)
    edges = [edge for span in spans(found) for edge in span]
    assert edges == sorted(edges)
    assert all(0 <= edge <= len(names) for edge in edges)
    for index in range(len(names)):
        span = found.around(index)
        assert (span is not None) == (found.position(index) == "layer")
    skeleton = find_skeleton(names)
    assert skeleton is None or all(s <= e for s, e in zip(skeleton.starts, skeleton.ends, strict=True))


def test_modules_tell_layers_of_different_length() -> None:
    kernels = [TracedKernel(f"k{i}", 0, 7, i, 1, None) for i in range(9)]
    zero, one = (Range(f"nn.Module: MiniMaxM3VLDecoderLayer_{n}", "1", n, 1) for n in range(2))
    inner = Range("nn.Module: Linear_5", "1", 0, 1)
    ranges = [(), (zero,), (zero, inner), (zero,), (one,), (one, inner), (one,), (one,), ()]
    found = find_layers(kernels, ranges, [None] * 9)
    assert (spans(found), found.found_by) == ([(1, 4), (4, 8)], "modules")
