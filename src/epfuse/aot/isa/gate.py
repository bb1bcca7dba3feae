"""The gate on executed machine code: which cases there are, and their run in parallel processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch

from epfuse.aot.calls import KINDS as LAYER_KINDS
from epfuse.aot.calls import Call, other_kinds
from epfuse.aot.isa.cases import (
    BudgetCase,
    Case,
    CaseRecord,
    Combining,
    Edges,
    Found,
    LayerCase,
    RoutingCase,
    Shards,
    run_case,
)
from epfuse.aot.isa.edges import FEWER, NARROW, STEPS, TARGET, Gemm
from epfuse.aot.isa.kept import Kept
from epfuse.aot.isa.layers import GAINS, Exact
from epfuse.aot.tasks import start
from epfuse.config import Combine, LayerShape, Path, WeightFormat
from epfuse.families.registry import FP8_PATHS
from epfuse.verify.problem import Problem
from epfuse.verify.scenarios import KINDS
from epfuse.verify.subject import Stored, Subject
from epfuse.workers import Died, Workers

EXPERTS, LOCAL, TOP_K = 128, 16, 4
"""MiniMax-M3's on 8 ranks: constants of the kernels, so that what is executed is what `epfuse aot` compiles."""

SUBJECTS = (
    Subject(Path.BF16, Stored.DENSE, WeightFormat.DENSE),
    Subject(Path.W8A16, Stored.MXFP8, WeightFormat.MXFP8_FNUZ),
    Subject(Path.W8A16, Stored.MXFP8, WeightFormat.MXFP8),
    Subject(Path.W8A8, Stored.MXFP8, WeightFormat.MXFP8_FNUZ),
    Subject(Path.W8A8, Stored.MXFP8, WeightFormat.MXFP8_FNUZ, Combine.ATOMIC),
    Subject(Path.BLOCK_FP8, Stored.MXFP8, WeightFormat.BLOCK_FP8_FNUZ),
    Subject(Path.BLOCK_FP8, Stored.MXFP8, WeightFormat.BLOCK_FP8_FNUZ, Combine.ATOMIC),
)
"""Every way in which gfx942 computes the layer."""

SIZES = {
    # Triton specialises on multiples of 16, of sizes and of scales in a row: as in MiniMax-M3 (6144, 3072) ..
    "even": {Path.BF16: (1152, 256), Path.W8A16: (1152, 256), Path.W8A8: (1536, 512), Path.BLOCK_FP8: (2048, 384)},
    # .. and as in gpt-oss-120b (2880, 2880), which leaves a tail in every loop over K
    "masked": {path: (1088, 320) for path in (Path.BF16, Path.W8A16, Path.W8A8, Path.BLOCK_FP8)},
}
"""(H, I) that make the same machine codes as the true sizes, and are as small as can be."""

SHORT = {
    "even": {Path.BF16: (256, 128), Path.W8A16: (256, 128), Path.W8A8: (512, 512), Path.BLOCK_FP8: (2048, 256)},
    "masked": {path: (320, 192) for path in (Path.BF16, Path.W8A16, Path.W8A8, Path.BLOCK_FP8)},
}
"""(H, I) that make the same machine codes of the GEMMs, not of quantize, activate and combine."""

TAIL = 96
"""H and I under one step of a loop over K, in the codes with a tail: the first step is the tail. Block FP8 has no such
case: the code for one block of scales in a row is another one."""

WIDE = 1088
"""H for which combine at `MANY` tokens has the machine code that it has for the true sizes."""

FEW = 9
"""Tokens of a layer in the smallest tile."""
LIVE = 30
"""Local routes of such a layer: 22, 7 and 1 of three experts. More than one block of one of them; and the last live row
of a block is the first, the second or the third of the four that a lane holds."""
MANY = 512
"""Tokens from which combine's tile is a larger one."""
TILES = {FEW: 16, MANY: 64, 1537: 128}
"""T -> the largest BLOCK_M of any family there."""

ROUTES: list[tuple[int, int]] = [
    *product((8, 16, 32, 64, 128, 256, 384), (16,)),
    *product((385, 1024), (16, 32, 64)),
    *product((1537,), (16, 32, 64, 128)),
    (1024, 128),
]
"""T and BLOCK_M of every size of the routing kernels."""


DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def layers(seed: int, all_sizes: dict[str, dict[Path, tuple[int, int]]]) -> Iterator[LayerCase]:
    """A layer for every machine code of a GEMM: way, sizes, dtype, tile."""
    for subject, sizes, (tokens, block_m) in product(SUBJECTS, all_sizes.values(), TILES.items()):
        for dtype in DTYPES if subject.form is WeightFormat.DENSE else DTYPES[:1]:
            if dtype == torch.float32 and tokens > MANY:  # its GEMMs have one tile at any T
                continue
            live = LIVE if tokens == FEW else block_m * 3 // 2 + 10
            yield _layer(subject, dtype, sizes[subject.path], tokens, live, seed)


def tails(seed: int) -> Iterator[LayerCase]:
    """Layers whose H and I are under one step of the loops."""
    for subject in SUBJECTS:
        if subject.path is not Path.BLOCK_FP8:
            yield _layer(subject, torch.bfloat16, (TAIL, TAIL), FEW, LIVE, seed)


def kinds(seed: int, all_sizes: dict[str, dict[Path, tuple[int, int]]]) -> Iterator[LayerCase]:
    """A layer for each kind of machine code with biases or another activation than SwiGLU-OAI, in the smallest tile."""
    for call in other_calls():
        activation, bias = LAYER_KINDS[call.kind]
        [exactly] = [each for each in GAINS if type(each) is type(activation)]
        subject = Subject(call.path, Stored.MXFP8, call.form)
        layer = _layer(subject, torch.bfloat16, all_sizes["masked"][call.path], FEW, LIVE, seed)
        yield LayerCase(replace(layer.exact, activation=exactly, bias=bias))


def other_calls() -> list[Call]:
    """The calls of other kinds whose kernels `epfuse aot` compiles."""
    return [call for path in SHORT["masked"] for call in other_kinds(TARGET, path)]


def gemms(seed: int) -> list[Gemm]:
    """The GEMMs of every way, with a tail and without."""
    found = []
    for subject, stage, (tail, columns) in product(SUBJECTS, ("gate_up", "down"), STEPS.items()):
        sizes = (columns, NARROW) if stage == "gate_up" else (NARROW, columns)
        kernel = f"{stage}{'_fp8' if subject.path in FP8_PATHS else ''}_kernel"
        exact = _layer(subject, torch.bfloat16, sizes, FEW, LIVE, seed).exact
        found.append(Gemm(kernel, exact, FEWER[tail]))
    return found


def _layer(
    subject: Subject, dtype: torch.dtype, sizes: tuple[int, int], tokens: int, live: int, seed: int
) -> LayerCase:
    shape = LayerShape(*sizes, EXPERTS, LOCAL, TOP_K)
    return LayerCase(Exact(subject.path, subject.form, dtype, subject.combine, shape, tokens, live, seed))


def combines(seed: int) -> Iterator[Combining]:
    """Combine's larger tile."""
    for dtype in DTYPES:
        yield Combining(_layer(SUBJECTS[0], dtype, (WIDE, TAIL), MANY, LIVE, seed).exact)


def routings(seed: int) -> Iterator[RoutingCase]:
    """Every size of the routing kernels."""
    shape = LayerShape(32, 32, EXPERTS, LOCAL, TOP_K)
    for tokens, block_m in ROUTES:
        yield RoutingCase(tokens, block_m, shape, seed)


def shards(seed: int) -> Shards:
    """Two ranks in float32."""
    shape = LayerShape(96, 64, 4, 2, 2)
    return Shards(Exact(Path.BF16, WeightFormat.DENSE, torch.float32, Combine.DETERMINISTIC, shape, 3, 0, seed))


def budgets(seed: int) -> Iterator[BudgetCase]:
    """Every way, every scenario of `epfuse verify`, on two ranks."""
    problem = Problem(160, 96, 4, 2, 2, (3,), torch.bfloat16, torch.device("cpu"), seed)
    for subject, scenario in product(SUBJECTS, KINDS):
        yield BudgetCase(problem, subject, (scenario,))


def other_budgets(seed: int) -> Iterator[BudgetCase]:
    """Each other kind of layer, in a scenario that the seed draws."""
    draw = random.Random(seed)
    for call in other_calls():
        activation, bias = LAYER_KINDS[call.kind]
        problem = Problem(160, 96, 4, 2, 2, (3,), torch.bfloat16, torch.device("cpu"), seed, activation, bias)
        stored = Stored.DENSE if call.form is WeightFormat.DENSE else Stored.MXFP8
        yield BudgetCase(problem, Subject(call.path, stored, call.form), (draw.choice(list(KINDS)),))


def every_case(seed: int) -> list[Case]:
    """All that there is."""
    wide = [layer for layer in layers(seed, SIZES) if layer.exact.tokens == FEW]
    tall = [layer for layer in layers(seed, SHORT) if layer.exact.tokens != FEW]
    found: list[Case] = [*wide, *tall, *tails(seed), *kinds(seed, SIZES), *combines(seed), *routings(seed)]
    found += [Edges(gemm) for gemm in gemms(seed)]
    return [*found, shards(seed), *budgets(seed), *other_budgets(seed)]


def share(seed: int) -> list[Case]:
    """What CI executes in one run: every kernel and every way in the smallest tile, and more by the seed.

    A run has for each way a layer with tails or one without, at few tokens, and one scenario of `epfuse verify`; one
    layer in a larger tile; the routing kernels in one launch and in two; the shards; a layer of another kind, and a
    scenario of one.
    """
    draw = random.Random(seed)
    found: list[Case] = []
    by_way: dict[object, list[LayerCase]] = {}
    larger = []
    for layer in layers(seed, SHORT):
        exact = layer.exact
        if exact.tokens == FEW:
            by_way.setdefault((exact.path, exact.form, exact.combine, exact.dtype), []).append(layer)
        else:
            larger.append(layer)
    found += [draw.choice(choices) for choices in by_way.values()]
    found.append(draw.choice(larger))
    one, two = ([each for each in routings(seed) if (each.tokens * TOP_K > 4096) is more] for more in (False, True))
    found += [draw.choice(one), draw.choice(two), shards(seed)]
    for subject in SUBJECTS:
        found.append(draw.choice([each for each in budgets(seed) if each.subject == subject]))
    return [*found, draw.choice(list(kinds(seed, SHORT))), draw.choice(list(other_budgets(seed)))]


def run(
    cases: list[Case], seed: int, workers: int, kept: Kept, progress: Callable[[int, int], None]
) -> list[CaseRecord]:
    """Execute cases in parallel.

    Args:
        cases: of `every_case` or `share`.
        seed: of the order in which waves and workgroups advance.
        workers: processes.
        kept: results that are there already, and where new ones go.
        progress: called with the cases done and the cases in all.
    """
    progress(0, len(cases))
    with Workers(workers, start, seconds=3600.0) as pool:
        results = pool.map(run_case, [(case, seed, kept) for case in cases], lambda done: progress(done, len(cases)))
    records = []
    for case, result in zip(cases, results, strict=True):
        found = Found([result.reason]) if isinstance(result, Died) else result
        records.append(CaseRecord(case.name, found))
    return records
