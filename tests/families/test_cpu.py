"""The layer on a CPU against float64: every format and dtype, all routings, sizes that grouped products refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI, Target, fused_experts
from epfuse.config import LayerShape, WeightFormat, silu_gate
from epfuse.families import cpu
from epfuse.families.family import CallKind, LayerCall
from epfuse.policy import READABLE, decide
from epfuse.reference import run_reference
from epfuse.verify import experts
from epfuse.verify.budget import compare, dense_tolerance
from epfuse.verify.suite import poisoned_memory
from tests.cases import ROUTINGS, Case, make_case

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = [form for forms in cpu.CPU.reads[Target.CPU].values() for form in forms]
ACTIVATIONS = [SwiGLUOAI(), silu_gate(), SwiGLUOAI(alpha=1.0, beta=0.0, limit=1.5)]


@pytest.fixture(params=["native", "widened"], autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of CPU: with products in the activations' dtype, and without."""
    native = request.param == "native"
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: native or dtype == torch.float32)
    monkeypatch.setattr(cpu, "RUN", 16)
    monkeypatch.setattr(cpu, "NATIVE_RUN", 16)


def in_format(weights: ExpertWeights, form: WeightFormat) -> ExpertWeights:
    return weights if form in weights.kept else experts.in_format(ExpertWeights.quantize(weights), form, Target.CPU)


def check(case: Case, weights: ExpertWeights, activation: SwiGLUOAI, path: Path = Path.AUTO) -> torch.Tensor:
    """Within the budget of `epfuse.verify.budget`, on any path."""
    operands = (case.hidden, weights, case.topk_weights, case.topk_ids, case.expert_map)
    oracle = run_reference(*operands, activation, torch.float64)
    with poisoned_memory():
        result = fused_experts(*operands, activation=activation, path=path, out=torch.full_like(case.hidden, torch.nan))
    assert result.dtype == case.hidden.dtype
    tolerance = dense_tolerance(case.hidden.dtype, weights.hidden, weights.intermediate)
    assert compare(result, oracle).within(tolerance), (compare(result, oracle), tolerance)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=[form.value for form in FORMS])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["oai", "silu", "clamped"])
def test_every_format_in_every_dtype(dtype: torch.dtype, form: WeightFormat, activation: SwiGLUOAI) -> None:
    case = make_case(CPU, tokens=37, hidden=96, intermediate=128, dtype=dtype, scale=3.0)
    check(case, in_format(case.weights, form), activation)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_every_routing(routing: str, tokens: int) -> None:
    case = make_case(CPU, tokens=tokens, routing=routing)
    check(case, case.weights, SwiGLUOAI())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_few_routes_are_sorted_as_many_are(routing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(CPU, tokens=64, routing=routing)
    case.topk_ids[7], case.topk_ids[8] = -1, case.expert_map.num_experts  # neither is an expert
    operands = (case.hidden, case.weights, case.topk_weights, case.topk_ids.to(dtype), case.expert_map)
    found = []
    for few in (0, case.topk_ids.numel()):
        monkeypatch.setattr(cpu, "FEW_ROUTES", few)
        found.append(fused_experts(*operands, activation=SwiGLUOAI()))
    torch.testing.assert_close(*found)  # a token's rows are added in another order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("local", [4, 16])
def test_rows_that_are_added_at_once_are_those_of_runs(
    local: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(CPU, tokens=200, local=local, dtype=dtype)
    if local < 16:  # else all routes are local
        case.topk_ids[7], case.topk_ids[199] = -1, 16
        case.topk_weights[7] = torch.nan
    asked: list[int] = []
    added = cpu._weigh_and_add

    def watched(call: LayerCall, rows: torch.Tensor, order: torch.Tensor) -> None:
        asked.append(len(rows))
        added(call, rows, order)

    monkeypatch.setattr(cpu, "_weigh_and_add", watched)
    at_once = check(case, case.weights, SwiGLUOAI())
    local_routes = int(((case.topk_ids >= 0) & (case.topk_ids < local)).sum())
    assert asked == ([local_routes] if cpu.multiplies(dtype) and dtype != torch.float32 else [])
    monkeypatch.setattr(cpu, "AT_ONCE", 200 * 4 * 64 // 16)
    asked.clear()
    torch.testing.assert_close(at_once, check(case, case.weights, SwiGLUOAI()))  # in another order
    assert not asked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [256, 255])
@pytest.mark.parametrize("row", [512, cpu.LONG_ROW])
def test_a_product_of_few_rows_is_no_less_exact(dtype: torch.dtype, size: int, row: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(size, row).to(dtype)
    for count in range(1, cpu.FEW_ROWS + 3):
        rows = torch.randn(2 * count, row).to(dtype)[::2]  # rows of a view, as those of gate are
        exact = rows.double() @ matrix.double().T
        found = cpu.product(rows, matrix)
        assert found.shape == exact.shape
        assert found.dtype == dtype
        own, torchs = ((each.double() - exact).norm() for each in (found, torch.nn.functional.linear(rows, matrix)))
        assert own <= 1.2 * torchs, (count, own / torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(33, 17), (40, 31), (16, 65)])
def test_sizes_that_the_grouped_product_refuses(dtype: torch.dtype, hidden: int, intermediate: int) -> None:
    case = make_case(CPU, tokens=19, hidden=hidden, intermediate=intermediate, dtype=dtype)
    check(case, case.weights, silu_gate())


def test_weights_that_do_not_begin_on_a_boundary() -> None:
    case = make_case(CPU, dtype=torch.float32)
    dense = case.weights.dense_experts

    def moved(stack: torch.Tensor) -> torch.Tensor:
        return torch.empty(stack.numel() + 1).narrow(0, 1, stack.numel()).view_as(stack).copy_(stack)

    check(case, ExpertWeights.dense(moved(dense.w13), moved(dense.w2)), silu_gate())


def test_the_ranks_add_up_and_two_calls_give_the_same_bits() -> None:
    whole = make_case(CPU, tokens=64, experts=16, local=16, dtype=torch.float32)
    dense = whole.weights.dense_experts
    parts = []
    for rank in range(4):
        mine = ExpertWeights.dense(dense.w13[4 * rank : 4 * rank + 4], dense.w2[4 * rank : 4 * rank + 4])
        emap = ExpertMap.contiguous(16, 4, rank)
        call = (whole.hidden, mine, whole.topk_weights, whole.topk_ids, emap)
        parts.append(fused_experts(*call))
        assert torch.equal(parts[-1], fused_experts(*call))
    torch.testing.assert_close(sum(parts), check(whole, whole.weights, SwiGLUOAI()), atol=1e-5, rtol=1e-5)


def test_nan_reaches_its_own_token_only_and_skipped_routes_nothing() -> None:
    case = make_case(CPU, tokens=24, routing="padding_ids", dtype=torch.float32)
    case.topk_weights[5] = torch.nan  # an odd token: all its ids are -1
    case.topk_weights[4] = torch.nan
    case.topk_ids[4, 0] = 0
    result = check(case, case.weights, SwiGLUOAI())
    assert result.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert not result[1::2].any()


def test_no_token_and_gradients_and_modes_leave_it_alone() -> None:
    case = make_case(CPU, dtype=torch.float32)
    none = case.hidden[:0], case.weights, case.topk_weights[:0], case.topk_ids[:0], case.expert_map
    assert fused_experts(*none).shape == (0, 64)
    want = check(case, case.weights, SwiGLUOAI())
    dense = case.weights.dense_experts
    learned = ExpertWeights.dense(dense.w13.clone().requires_grad_(), dense.w2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused_experts(case.hidden, learned, case.topk_weights, case.topk_ids, case.expert_map)
    assert torch.equal(got, want)
    assert not got.requires_grad


@pytest.mark.parametrize("form", FORMS, ids=[form.value for form in FORMS])
@pytest.mark.parametrize("local", [4, 16])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_tensors_that_are_made_elsewhere_by_default_leave_it_alone(tokens: int, local: int, form: WeightFormat) -> None:
    """README's own example sets a default device: a GPU's, where there is one."""
    case = make_case(CPU, tokens=tokens, local=local, intermediate=64)
    call = (case.hidden, in_format(case.weights, form), case.topk_weights, case.topk_ids, case.expert_map)
    want = fused_experts(*call)
    with torch.device("meta"):
        got = fused_experts(*call)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", list(WeightFormat))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_it_wherever_the_weights_are_as_a_checkpoint_has_them(
    form: WeightFormat, dtype: torch.dtype
) -> None:
    decision = decide(CallKind(Path.AUTO, Target.CPU, LayerShape(64, 64, 8, 8, 2), frozenset({form}), dtype), 5)
    paths = [path for path, forms in READABLE[Target.CPU].items() if form in forms]
    assert decision.path is next(iter(paths), Path.REFERENCE)
    assert (decision.family is cpu.CPU) is (form in FORMS)


def test_the_formats_of_checkpoints_are_read() -> None:
    assert cpu.CPU.reads[Target.CPU] == {
        Path.W8A16: (WeightFormat.MXFP8, WeightFormat.BLOCK_FP8),
        Path.BF16: (WeightFormat.DENSE,),
    }


def test_runs_have_all_rows_once() -> None:
    for counts in ([], [3], [5, 20, 1], [16] * 4, [1] * 40, [100]):
        held = [cpu.ExpertRows(2 * index, count) for index, count in enumerate(counts)]
        runs = list(cpu.runs_of(held, 16))
        assert [one for run in runs for one in run] == held
        for run in runs:
            assert sum(one.rows for one in run) >= 16 or run is runs[-1]


@pytest.mark.parametrize("form", FORMS, ids=[form.value for form in FORMS])
def test_one_token_has_its_routes_in_any_order_twice_elsewhere_and_nowhere(form: WeightFormat) -> None:
    """One token's routes are neither sorted nor grouped; the rest of a call's are."""
    case = make_case(CPU, tokens=1, experts=8, hidden=64, intermediate=64, dtype=torch.bfloat16)
    weights = in_format(case.weights, form)
    local = [expert for expert, slot in enumerate(case.expert_map.on(CPU).tolist()) if slot >= 0]
    for ids in ([local[-1], local[0], local[-1]], [local[0], -1, 2**31 - 1], [-1, 99, -7]):
        scores = torch.tensor([[0.75, -0.5, 2.0]])
        routed = replace(case, topk_ids=torch.tensor([ids]), topk_weights=scores)
        check(routed, weights, SwiGLUOAI())


def test_a_grouped_product_is_asked_where_most_of_a_run_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's takes its time for each expert without rows, too: 28 of 32 at one token."""
    asked: list[int] = []
    monkeypatch.setattr(cpu, "grouped_mm", lambda x, stack, offs: asked.append(len(offs)) or x @ stack[0])
    many = cpu.FEW_ROWS + 1
    for dtype, each in ((torch.float32, many), (torch.bfloat16, 1)):
        products = cpu.Products(torch.zeros(32, 16, 16, dtype=dtype), dtype)
        monkeypatch.setattr(products, "widens", cpu.ALL)
        for held, grouped in (([0, 9, 20, 31], []), ([0, 1, 2, 3], [4]), ([4, 5, 7], [4]), ([4, 9], [])):
            asked.clear()
            run = [cpu.ExpertRows(expert, each) for expert in held]
            products(torch.zeros(each * len(held), 16, dtype=dtype), run)
            assert asked == grouped, (dtype, held)


def test_fp32_experts_of_few_rows_each_are_multiplied_one_by_one() -> None:
    """There the library's grouped product takes up to twice the time."""
    products = cpu.Products(torch.zeros(4, 16, 16), torch.float32)
    for rows, grouped in (([1, 1, 1, 1], False), ([2, 3, 4, 3], False), ([2, 3, 5, 3], True)):
        assert products.groups([cpu.ExpertRows(*one) for one in enumerate(rows)]) is grouped
