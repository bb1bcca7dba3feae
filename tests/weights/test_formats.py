"""Weights know what their bytes mean: no conversion takes one format's for another's, and what is consumed says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, Target, fused_experts
from epfuse.compile_ops import put_together, take_apart
from epfuse.config import Combine, LayerShape, WeightFormat
from epfuse.errors import ConfigError, DtypeError, EpfuseError, LayoutError, ShapeError
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.policy import READABLE
from epfuse.stages.quantize.rows import FP8Rows
from epfuse.stages.route.reference import route
from epfuse.stages.tiles import GemmTile
from epfuse.weights.block_fp8 import BlockFP8, BlockFP8Experts
from epfuse.weights.dense import DenseExperts
from epfuse.weights.formats import BYTES_PER_WEIGHT, PREPARED_FOR
from epfuse.weights.fragment import FragmentExperts, check_packable, pack
from epfuse.weights.mxfp8 import MXFP8Experts
from epfuse.weights.panels import RowOrder
from epfuse.weights.projections import expert_matrix
from epfuse.weights.row_fp8 import pack_rows

LOCAL, HIDDEN, INTERMEDIATE = 2, 128, 64


def parts(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """w13, its scales, w2, its scales; every value also fits one scale a row, exactly."""
    rng = torch.Generator().manual_seed(seed)
    stacks = (
        torch.randint(1, 8, (LOCAL, 2 * INTERMEDIATE, HIDDEN), generator=rng).float() / 8,
        torch.randint(1, 8, (LOCAL, HIDDEN, INTERMEDIATE), generator=rng).float() / 8,
    )
    return tuple(part for w in map(MXFP8.quantize, stacks) for part in (w.values, w.scales))


def numbers(weights: ExpertWeights, form: WeightFormat) -> list[torch.Tensor]:
    experts = weights.kept[form]
    return [
        expert_matrix(stack, expert, torch.float64)
        for stack in (experts.w13, experts.w2)
        for expert in range(weights.local_experts)
    ]


MAKERS = {
    "dense": lambda: ExpertWeights.dense(*(MXFP8(*pair).dequantize() for pair in (parts()[:2], parts()[2:]))),
    "mxfp8": lambda: ExpertWeights.mxfp8(*parts()),
    "hybrid": lambda: ExpertWeights.hybrid(*parts()),
    "block_fp8": lambda: ExpertWeights.block_fp8(*parts()),
}
STEPS = [(target, path) for target in Target for path in (Path.AUTO, Path.W8A8)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("first", STEPS, ids=lambda step: f"{step[0].value}-{step[1].value}")
def test_whatever_is_prepared_twice_holds_the_numbers_or_is_refused(make: str, first: tuple[Target, Path]) -> None:
    exact = numbers(MAKERS["mxfp8"](), WeightFormat.MXFP8)
    for second in STEPS:
        once = MAKERS[make]().prepare(*first)
        made_for = {PREPARED_FOR[form] for form in once.kept if form in PREPARED_FOR}
        if second[0].is_gpu and made_for - {second[0]}:
            with pytest.raises(ConfigError, match="needs them as the checkpoint has them: load them again"):
                once.prepare(*second)
            twice = once  # nothing was changed
        else:
            twice = once.prepare(*second)
        for form in twice.kept:
            for ours, theirs in zip(numbers(twice, form), exact, strict=True):
                assert torch.equal(ours, theirs)


def test_no_target_reads_an_order_that_was_made_for_another() -> None:
    for target, path in itertools.product(Target, Path):
        for form in READABLE[target].get(path, ()):
            assert PREPARED_FOR.get(form, target) is target


@pytest.mark.parametrize("path", [Path.AUTO, Path.W8A8])
def test_codes_of_gfx942_are_not_packed_for_hopper(path: Path) -> None:
    """The same bytes mean half the value there."""
    ready = ExpertWeights.mxfp8(*parts()).prepare(Target.GFX942)
    with pytest.raises(ConfigError, match="weights are in mxfp8_fnuz, prepared for gfx942; sm_90 needs them"):
        ready.prepare(Target.SM90, path)
    stack = ready.mxfp8_experts.w13
    for convert in (lambda w: pack(w, RowOrder.GATE_UP), lambda w: pack_rows(w, RowOrder.GATE_UP), check_packable):
        with pytest.raises(DtypeError, match=r"codes in torch\.float8_e4m3fnuz; Hopper's orders are made from"):
            convert(stack)
    with pytest.raises(DtypeError, match="E4M3FNUZ is made from float8_e4m3fn"):
        ExpertWeights.block_fp8(*parts()).prepare(Target.GFX942).reference_experts.w13.to_fnuz_()


@pytest.mark.parametrize(
    ("make", "target", "path"),
    [
        ("mxfp8", Target.SM90, Path.AUTO),
        ("mxfp8", Target.SM90, Path.W8A8),
        ("mxfp8", Target.GFX942, Path.AUTO),
        ("hybrid", Target.SM90, Path.AUTO),
        ("hybrid", Target.GFX942, Path.AUTO),
        ("block_fp8", Target.GFX942, Path.AUTO),
    ],
)
def test_consumed_weights_say_so_at_every_use(make: str, target: Target, path: Path) -> None:
    weights = MAKERS[make]()
    kept = weights.reference_experts
    again = replace(weights)  # shares the matrices
    weights.prepare(target, path)
    hidden, ids = torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    for consumed in (weights, again):
        for use in (
            lambda w: fused_experts(hidden, w, torch.ones(1, 1), ids, ExpertMap.all_local(LOCAL)),
            lambda w: w.prepare(target, path),
            lambda w: w.prepare(Target.CPU),
            lambda w: w.kept,
            lambda w: w.nbytes,
            lambda w: w.device,
            lambda w: w.reference_experts,
        ):
            with pytest.raises(ConfigError, match=r"weights are gone: their memory holds .* use what"):
                use(consumed)
    for use in (lambda: kept.w13.values, lambda: kept.w2.scales, lambda: kept.w2.dequantize(), lambda: kept.w13.nbytes):
        with pytest.raises(ConfigError, match="weights are gone"):
            use()
    assert "became" in repr(weights)


def test_a_refused_preparation_consumes_nothing() -> None:
    for broken in (1, 3):
        tensors = parts()
        tensors[broken][0, 0, 0] = 254
        weights = ExpertWeights.mxfp8(*tensors)
        before = numbers(weights, WeightFormat.MXFP8)
        with pytest.raises(ConfigError, match="254"):
            weights.prepare(Target.GFX942)
        assert weights.prepare(Target.SM90) is weights  # fragment order can't hold it either, and leaves it
        assert all(map(torch.equal, numbers(weights, WeightFormat.MXFP8), before))
    block = ExpertWeights.block_fp8(*parts())
    block.reference_experts.w2.scales[0, 0, 0] = 3e38
    with pytest.raises(ConfigError, match="whose double float32 can't hold"):
        block.prepare(Target.GFX942)
    assert numbers(block, WeightFormat.BLOCK_FP8)


def test_sizes_that_are_padded_are_consumed_all_the_same() -> None:
    """Whether new memory was taken does not decide what may be used."""
    rng = torch.Generator().manual_seed(0)
    stacks = [MXFP8.quantize(torch.randn(2, n, k, generator=rng)) for n, k in ((192, 160), (160, 96))]
    weights = ExpertWeights.mxfp8(*(part for w in stacks for part in (w.values, w.scales)))
    weights.prepare(Target.SM90)
    with pytest.raises(ConfigError, match="weights are gone"):
        _ = weights.kept


@pytest.mark.parametrize("values", [torch.uint8, torch.int8, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.bfloat16])
def test_values_of_another_dtype_are_refused_by_name(values: torch.dtype) -> None:
    w13, s13, w2, s2 = parts()
    other = w13.view(values) if values.itemsize == 1 else w13.to(values)
    for make in (ExpertWeights.mxfp8, ExpertWeights.hybrid, ExpertWeights.block_fp8):
        with pytest.raises(DtypeError, match=f"w13 has dtype {values}; it must be float8_e4m3fn"):
            make(other, s13, w2, s2)


@pytest.mark.parametrize("make", [ExpertWeights.mxfp8, ExpertWeights.hybrid, ExpertWeights.block_fp8])
def test_scale_bytes_are_the_same_bits_under_both_of_their_dtypes(make) -> None:
    w13, s13, w2, s2 = parts()
    want = make(w13, s13, w2, s2)
    got = make(w13, s13.view(torch.float8_e8m0fnu), w2, s2.view(torch.float8_e8m0fnu))
    form = next(iter(want.kept))
    assert all(map(torch.equal, numbers(got, form), numbers(want, form)))
    for other in (s13.view(torch.int8), s13.float(), s13.view(torch.float8_e4m3fn), s13.to(torch.int32)):
        with pytest.raises(DtypeError, match=r"w13, w13_scale: scales has dtype .*uint8 or float8_e8m0fnu"):
            make(w13, other, w2, s2)


def test_a_layer_is_of_one_kind_however_it_is_made() -> None:
    def stored(rows: int = 2 * INTERMEDIATE) -> tuple[MXFP8, MXFP8]:
        w13, s13, w2, s2 = parts()
        return MXFP8(w13[:, :rows].contiguous(), s13[:, :rows].contiguous()), MXFP8(w2, s2)

    def fragments(order: RowOrder) -> tuple[object, object]:
        w13, w2 = stored()
        return pack(w13, order), pack(w2, RowOrder.PLAIN)

    def mixed() -> MXFP8Experts:
        w13, w2 = stored()
        return MXFP8Experts(w13, w2.to_fnuz_())

    layer, smaller = MXFP8Experts(*stored()), DenseExperts(torch.zeros(1, 32, 32), torch.zeros(1, 32, 16))
    cases: list[tuple[Callable[[], object], type[EpfuseError], str]] = [
        (mixed, DtypeError, "w13 is in torch.float8_e4m3fn and w2 in torch.float8_e4m3fnuz"),
        (lambda: FragmentExperts(*fragments(RowOrder.PLAIN)), LayoutError, "rows in the orders PLAIN and PLAIN"),
        (lambda: MXFP8Experts(*fragments(RowOrder.GATE_UP)), ConfigError, "w13 is a FragmentMXFP8; it must be a MXFP8"),
        (lambda: BlockFP8Experts(*stored()), ConfigError, "w13 is a MXFP8; it must be a BlockFP8"),
        (lambda: MXFP8Experts(*stored(rows=96)), ShapeError, r"w2 has shape \(2, 128, 64\); beside w13 \(2, 96, 128\)"),
        (lambda: ExpertWeights((stored(),)), ConfigError, "formats has a tuple; it must hold some of MXFP8Experts"),
        (lambda: ExpertWeights(()), ConfigError, "in no format at all"),
        (lambda: ExpertWeights(layer), ConfigError, "in no format at all"),
        (lambda: ExpertWeights((layer, layer)), ConfigError, "mxfp8 twice"),
        (lambda: ExpertWeights((smaller, layer)), ShapeError, r"dense has \(L, H, I\) = \(1, 32, 16\) and mxfp8"),
    ]
    for make, kind, words in cases:
        with pytest.raises(kind, match=words):
            make()


@pytest.mark.parametrize("form", WeightFormat)
def test_a_format_says_where_its_bytes_lie(form: WeightFormat) -> None:
    shape = LayerShape(256, 384, 4, 3, 2)
    weights = ExpertWeights.without_data(form, shape)
    assert list(weights.kept) == [form]
    assert (weights.local_experts, weights.hidden, weights.intermediate) == (3, 256, 384)
    numbers = 3 * 3 * 256 * 384
    assert weights.nbytes[form] == sum(tensor.nbytes for _, tensor in weights.kept[form].tensors())
    assert weights.nbytes[form] / numbers == pytest.approx(BYTES_PER_WEIGHT[form], rel=0.02)


@pytest.mark.parametrize(
    ("make", "target", "path"),
    [
        (ExpertWeights.mxfp8, Target.SM90, Path.AUTO),
        (ExpertWeights.mxfp8, Target.SM90, Path.W8A8),
        (ExpertWeights.mxfp8, Target.GFX942, Path.AUTO),
        (ExpertWeights.hybrid, Target.GFX942, Path.AUTO),
    ],
)
def test_memory_that_prepare_took_is_not_read_as_a_checkpoint_again(make, target: Target, path: Path) -> None:
    """A second layer over the same tensors would compute with garbage, or with E4M3FNUZ as E4M3FN."""
    tensors = parts()
    prepared = make(*tensors).prepare(target, path)
    views = tuple(tensor.view(torch.uint8).view(tensor.dtype) for tensor in tensors)
    for given in (tensors, views, tuple(tensor[:1] for tensor in tensors)):
        for again in (ExpertWeights.mxfp8, ExpertWeights.hybrid, ExpertWeights.block_fp8):
            with pytest.raises(ConfigError, match=r"w13 lies in memory that holds .* now: ExpertWeights.prepare"):
                again(*given)
    names, taken = take_apart(prepared)
    assert put_together(names, taken, HIDDEN, INTERMEDIATE).kept.keys() == prepared.kept.keys()
    arena = torch.zeros(2 * tensors[0].numel(), dtype=torch.uint8).view(torch.float8_e4m3fn)
    for half in arena.view(2, *tensors[0].shape):  # two layers of one storage
        half.copy_(parts()[0])
        ExpertWeights.mxfp8(half, *parts()[1:]).prepare(target, path)


def test_memory_that_prepare_left_alone_may_be_read_again() -> None:
    rng = torch.Generator().manual_seed(0)
    stacks = [MXFP8.quantize(torch.randn(2, n, k, generator=rng)) for n, k in ((192, 160), (160, 96))]
    tensors = tuple(part for w in stacks for part in (w.values, w.scales))
    before = numbers(ExpertWeights.mxfp8(*tensors), WeightFormat.MXFP8)
    ExpertWeights.mxfp8(*tensors).prepare(Target.SM90, Path.W8A8)  # padded: in new memory
    after = numbers(ExpertWeights.mxfp8(*tensors), WeightFormat.MXFP8)
    assert all(map(torch.equal, before, after))


def test_quantize_names_the_projection_whose_rows_are_no_whole_blocks() -> None:
    for hidden, intermediate, words in ((64, 176, "w2 has rows of I=176"), (72, 64, "w13 has rows of H=72")):
        dense = ExpertWeights.dense(torch.zeros(1, 2 * intermediate, hidden), torch.zeros(1, hidden, intermediate))
        with pytest.raises(ShapeError, match=f"{words} weights; MXFP8 needs a multiple of 32"):
            ExpertWeights.quantize(dense)


def test_a_default_device_does_not_matter_to_packing() -> None:
    want = pack(MXFP8(*parts()[:2]), RowOrder.GATE_UP)
    with torch.device("meta"):
        got = pack(MXFP8(*(part.to("cpu") for part in parts_on_cpu())), RowOrder.GATE_UP)
    assert torch.equal(got.codes, want.codes)


def parts_on_cpu() -> tuple[torch.Tensor, ...]:
    with torch.device("cpu"):
        return parts()[:2]


def test_block_scales_are_not_doubled_twice() -> None:
    block = BlockFP8.quantize(torch.randn(1, 128, 128))
    fnuz = block.to_fnuz_()
    before = fnuz.dequantize(torch.float64)
    with pytest.raises(DtypeError):
        fnuz.to_fnuz_()
    assert torch.equal(fnuz.dequantize(torch.float64), before)


def test_rows_and_weights_in_two_kinds_of_e4m3_are_not_multiplied() -> None:
    pytest.importorskip("triton")
    from epfuse.stages.down.launch_fp8 import launch_down_fp8
    from epfuse.stages.gate_up.launch_fp8 import launch_gate_up_fp8

    weights = ExpertWeights.mxfp8(*parts()).mxfp8_experts
    tile = GemmTile(32, 32, 1, 4, 1)
    for dtype, group, kind, words in (
        (
            torch.float8_e4m3fnuz,
            32,
            DtypeError,
            "x has dtype torch.float8_e4m3fnuz and the weights",
        ),
        (torch.float8_e4m3fn, 128, ShapeError, "x has groups of 128; beside these weights they must be of 32"),
    ):
        x = FP8Rows.empty(1, HIDDEN, group, dtype, torch.device("cpu"))
        y = FP8Rows.empty(1, INTERMEDIATE, group, dtype, torch.device("cpu"))
        routes = route(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), LOCAL, 16)
        with pytest.raises(kind, match=words):
            launch_gate_up_fp8(x, weights.w13, routes, 1, tile, torch.empty(1, 2 * INTERMEDIATE))
        out = torch.empty(1, HIDDEN, dtype=torch.bfloat16)
        with pytest.raises(kind, match=words.replace("x has", "y has")):
            launch_down_fp8(y, weights.w2, routes, torch.ones(1, 1), tile, Combine.DETERMINISTIC, out)


def test_scales_of_rows_are_kept_as_bytes() -> None:
    values, scales = torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.full((2, 2), 127, dtype=torch.uint8)
    rows = FP8Rows(values, scales.view(torch.float8_e8m0fnu), 32)
    assert rows.scales.dtype == torch.uint8
    assert torch.equal(rows.scales, scales)
