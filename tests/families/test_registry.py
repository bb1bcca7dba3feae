"""What the families say of themselves holds together: who serves which call, in which tiles, how far a call goes."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import FrameType

import pytest
import torch

from epfuse import Combine, ExpertWeights, Path, SwiGLUOAI, Target, scratch_size
from epfuse.aot.calls import SHAPES, Call
from epfuse.aot.tasks import start
from epfuse.config import MINIMAX_M3_EP8 as M3
from epfuse.config import Bias, LayerShape, WeightFormat
from epfuse.families.family import CallKind, Family, LayerCall
from epfuse.families.registry import FAMILIES, READABLE, default_ranges, family_of, serving
from epfuse.families.sm90_fp8 import SM90_FP8
from epfuse.families.sm90_fp8_rows import SM90_FP8_ROWS
from epfuse.stages.tiles import LayerTiles
from epfuse.target import planning_for

GPUS = [target for target in Target if target.is_gpu]
READS = [(target, path, form) for target in GPUS for path, forms in READABLE[target].items() for form in forms]
ODD = LayerShape(hidden=2880, intermediate=2880, experts=128, local_experts=16, top_k=4)


@pytest.mark.parametrize(("target", "path", "form"), READS)
@pytest.mark.parametrize("shape", [M3, ODD], ids=["whole", "odd"])
def test_every_format_that_is_read_is_served_at_any_number_of_rows(
    target: Target, path: Path, form: WeightFormat, shape: LayerShape
) -> None:
    kind = CallKind(path, target, shape, frozenset({form}))
    families, ranges = serving(kind), default_ranges(kind)
    assert families
    assert [entry.max_rows for entry in ranges] == sorted({entry.max_rows for entry in ranges})
    assert math.isinf(ranges[-1].max_rows)
    for entry in ranges:
        family = family_of(path, form, entry.tiles)
        assert family in families
        for tile in (entry.tiles.gate_up, entry.tiles.down):
            assert type(tile) is family.tile


@pytest.mark.parametrize(
    ("shape", "bias", "last"),
    [
        (M3, Bias.NONE, SM90_FP8_ROWS),
        (M3, Bias.ADDED, SM90_FP8),  # down would spill
        (ODD, Bias.NONE, SM90_FP8),  # 2880 is an odd number of steps of 128
    ],
)
def test_many_fp8_rows_run_on_the_family_that_has_code_for_them(shape: LayerShape, bias: Bias, last: Family) -> None:
    kind = CallKind(Path.W8A8, Target.SM90, shape, frozenset({WeightFormat.ROW_FP8}), bias=bias)
    ranges = default_ranges(kind)
    assert [entry.max_rows for entry in ranges[-2:]] == [144, math.inf]
    assert [family_of(Path.W8A8, WeightFormat.ROW_FP8, entry.tiles) for entry in ranges[-2:]] == [SM90_FP8, last]


@pytest.mark.parametrize(("target", "path", "form"), READS)
@pytest.mark.parametrize("rows", [0.03, 4.0, 64.0, 300.0])
def test_what_is_searched_belongs_to_the_family_that_names_it(
    target: Target, path: Path, form: WeightFormat, rows: float
) -> None:
    kind = CallKind(path, target, M3, frozenset({form}))
    for family in serving(kind):
        for block_m in family.block_ms(rows):
            for tile in itertools.islice(family.candidates(kind, block_m, rows), 20):
                assert family_of(path, form, LayerTiles(block_m, tile, tile)) is family
                assert family.fits(tile, form, block_m)


def test_who_does_not_accept_says_why() -> None:
    for family in FAMILIES:
        for target, path, form in itertools.product(GPUS, READABLE[Target.SM90], WeightFormat):
            refusal = family.accepts(CallKind(path, target, M3, frozenset({form})))
            assert (refusal is None) is (form in family.reads.get(target, {}).get(path, ()))
            assert refusal is None or refusal.endswith(".")
        target, (path, forms) = next(iter(family.reads)), next(iter(next(iter(family.reads.values())).items()))
        atomic = family.accepts(CallKind(path, target, M3, frozenset({forms[0]}), combine=Combine.ATOMIC))
        assert (atomic is None) is (Combine.ATOMIC in family.combines)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_no_path_takes_less_scratch_than_its_families(family: Family) -> None:
    for paths in family.reads.values():
        for path in paths:
            whole, own = scratch_size(path, 37, 4, 512, 256), family.scratch(37, 4, 512, 256)
            assert whole.y >= own.y
            assert whole.routed >= own.routed


@pytest.mark.parametrize(
    ("family", "target", "path", "form"),
    [
        (family, target, path, form)
        for family in FAMILIES
        for target, paths in family.reads.items()
        for path, forms in paths.items()
        for form in forms
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_steps_are_those_that_the_docstring_names(
    family: Family, target: Target, path: Path, form: WeightFormat
) -> None:
    """On tensors without data: only the launches are made, and none runs."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    tokens, hidden = 64, M3.hidden
    with planning_for(target):
        experts = ExpertWeights.without_data(form, M3).kept[form]
        call = LayerCall(
            hidden=empty(tokens, hidden),
            w13=experts.w13,
            w2=experts.w2,
            topk_weights=empty(tokens, M3.top_k, dtype=torch.float32),
            topk_ids=empty(tokens, M3.top_k, dtype=torch.int32),
            slots=empty(M3.experts, dtype=torch.int32),
            shape=M3,
            activation=SwiGLUOAI(),
            combine=Combine.DETERMINISTIC,
            out=empty(tokens, hidden),
            scratch=None,
        )
        kind = CallKind(path, target, M3, frozenset({form}))
        ranges, block_m = family.defaults(kind), family.block_ms(300.0)[0]
        tiles = ranges[0].tiles if ranges else LayerTiles.both(block_m, next(family.candidates(kind, block_m, 300.0)))
        steps = [name for name, _ in family.steps(call, tiles).launches]
    named = re.match(r"\w+(?: -> \w+)*", inspect.getdoc(type(family)) or "")
    assert named is not None
    assert steps == named[0].split(" -> ")


def _way_of_hidden(call: Call) -> list[list[str]]:
    """Of each launch that takes hidden: our functions that had it in hand on the way from `fused_experts`.

    Those are the ones on the stack, and the one that bound the launch beforehand. A function that looks at hidden and
    gives it to nobody (a check, memory for the rows between) is on no way.
    """
    from epfuse.aot.launches import launches_of

    bound: list[str] = []
    ways: list[list[str]] = []

    def holds(frame: FrameType) -> bool:
        values = [value for value in frame.f_locals.values() if isinstance(value, torch.Tensor | LayerCall)]
        tensors = [value.hidden if isinstance(value, LayerCall) else value for value in values]
        return any(tensor.shape == (call.tokens, SHAPES[call.shape].hidden) for tensor in tensors)

    def watch(frame: FrameType, event: str, _: object) -> None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if event != "call" or f"{os.sep}epfuse{os.sep}" not in file or not holds(frame):
            return
        if name == "steps":
            bound[:] = [name]
        if name.startswith("launch_"):
            above, stack = frame.f_back, [name]
            while above is not None:
                if f"{os.sep}epfuse{os.sep}" in above.f_code.co_filename and holds(above):
                    stack.append(above.f_code.co_name)
                above = above.f_back
            ways.append([*stack[stack.index("fused_experts") :], *bound, *stack[: stack.index("fused_experts")]])

    def run() -> None:
        sys.setprofile(watch)
        try:
            call.run()
        finally:
            sys.setprofile(None)

    launches_of(call.target, run)
    return ways


@pytest.mark.parametrize("target", GPUS)
def test_hidden_goes_through_three_of_our_functions_to_a_launch(target: Target) -> None:
    calls = [
        Call(target, path, form, "bf16", "minimax-m3", Combine.DETERMINISTIC, tokens)
        for path, forms in READABLE[target].items()
        for form in forms
        for tokens in (64, 4096)
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        for call, ways in zip(calls, pool.map(_way_of_hidden, calls), strict=True):
            assert ways, call
            assert all(len(way) <= 3 and way[:2] == ["fused_experts", "steps"] for way in ways), (call, ways)
