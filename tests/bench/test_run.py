from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from epfuse.bench.compare import check_comparable
from epfuse.bench.contender import Contender, ContenderKind, paths_of, problem_of
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import LAYERS, SIZES, make_layer
from epfuse.bench.measure import Call, Sampling
from epfuse.bench.peers.find import find_peers
from epfuse.bench.record import BenchRow
from epfuse.bench.routing import Routing
from epfuse.bench.run import BenchPlan, run_points
from epfuse.bench.weights import LayerWeights
from epfuse.config import Bias
from epfuse.errors import ConfigError
from tests.bench.records import ROOFS

CPU = torch.device("cpu")
SMALL = LAYERS["small"]
PLAN = BenchPlan(SMALL, (3,), (Routing.parse("uniform"),), CPU, 0, Sampling(samples=2, seconds=1e-4))
Change = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> LayerWeights:
    return LayerWeights(SMALL, 0, CPU)


@pytest.fixture
def ours(weights: LayerWeights) -> Contender:
    return paths_of(problem_of(SMALL, (1, 8192), CPU, 0), (), weights)[0]


def spoiled(contender: Contender, change: Change) -> Contender:
    """The same with ``change`` applied to each result; it is given the number of calls before."""

    def bind(inputs: Inputs) -> Call:
        right, made = contender.bind(inputs), 0

        def call() -> torch.Tensor:
            nonlocal made
            made += 1
            return change(right(), made - 1)

        return call

    return replace(contender, bind=bind)


def run_one(weights: LayerWeights, contender: Contender) -> BenchRow:
    ((row,),) = run_points(PLAN, weights, [contender], ROOFS)
    return row


def test_a_right_result_has_a_time(weights: LayerWeights, ours: Contender) -> None:
    row = run_one(weights, ours)
    assert row.ok
    assert row.time is not None
    assert row.time.median_us > 0
    assert row.relative_error is not None
    assert 1e-4 < row.relative_error < row.error_limit
    assert (row.contender, row.routing, row.tokens, row.variants) == ("bf16", "uniform", 3, 8)
    assert row.floor_us == pytest.approx(1e6 * max(row.weight_bytes / 3e12, row.flops / 5e13), rel=0.3)


def lost_row(result: torch.Tensor, made: int) -> torch.Tensor:
    return result.index_fill(0, torch.tensor([result.shape[0] - 1]), 0.0)


def nan_element(result: torch.Tensor, made: int) -> torch.Tensor:
    return result.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan, dtype=result.dtype))


def wrong_when_timed(result: torch.Tensor, made: int) -> torch.Tensor:
    return result * 1.1 if made > 0 else result


@pytest.mark.parametrize("change", [lost_row, nan_element, wrong_when_timed])
def test_a_wrong_result_has_no_time(weights: LayerWeights, ours: Contender, change: Change) -> None:
    row = run_one(weights, spoiled(ours, change))
    assert row.time is None
    assert row.wrong
    assert not row.ok
    assert row.failure is not None
    assert ("the timed calls' result is wrong" if change is wrong_when_timed else "the result is wrong") in row.failure


def test_an_output_that_is_not_written_is_poison(weights: LayerWeights, ours: Contender) -> None:
    lazy = replace(ours, bind=lambda inputs: lambda: torch.empty_like(inputs.hidden))
    assert run_one(weights, lazy).wrong


@pytest.mark.parametrize("kind", list(ContenderKind))
def test_a_failure_costs_its_own_row(weights: LayerWeights, ours: Contender, kind: ContenderKind) -> None:
    def breaks(result: torch.Tensor, made: int) -> torch.Tensor:
        raise RuntimeError("no kernel image\nand a long trace")

    broken = replace(spoiled(ours, breaks), kind=kind)
    ((first, second),) = run_points(PLAN, weights, [broken, ours], ROOFS)
    assert first.failure == "RuntimeError: no kernel image"
    assert first.time is None
    assert not first.wrong
    assert first.ok == (kind is ContenderKind.PEER)  # a peer may be unable to run, a path of ours may not
    assert second.time is not None


def test_out_of_memory(weights: LayerWeights, ours: Contender) -> None:
    def runs_out(result: torch.Tensor, made: int) -> torch.Tensor:
        raise torch.OutOfMemoryError

    assert run_one(weights, spoiled(ours, runs_out)).failure == "cpu is out of memory"


def test_points_come_in_order_and_progress_names_them(weights: LayerWeights, ours: Contender) -> None:
    plan = replace(PLAN, tokens=(1, 2), routings=(Routing.parse("uniform"), Routing.parse("all-to:2")))
    said: list[str] = []
    found = [(r.routing, r.tokens) for rows in run_points(plan, weights, [ours], ROOFS, said.append) for r in rows]
    assert found == [("uniform", 1), ("uniform", 2), ("all-to:2", 1), ("all-to:2", 2)]
    assert said[0] == "T=1 uniform, bf16"
    assert len(said) == 4


def test_a_layer_with_biases_is_right_alone_beside_no_peer_and_its_record_says_so() -> None:
    sizes = dict(zip(SIZES, (64, 64, 8, 2, 2), strict=True))
    layer = make_layer("gpt-oss-20b-biases", sizes, None)
    assert layer.bias is Bias.ADDED
    plan = replace(PLAN, layer=layer)
    mine = LayerWeights(layer, 0, CPU)
    contenders = paths_of(problem_of(layer, (3,), CPU, 0), ("bf16", "w8a16"), mine)
    assert all(row.ok for rows in run_points(plan, mine, contenders, ROOFS) for row in rows)
    plain = paths_of(problem_of(layer, (3,), CPU, 0), ("bf16",), LayerWeights(replace(layer, bias=Bias.NONE), 0, CPU))
    assert not any(row.ok for rows in run_points(plan, mine, plain, ROOFS) for row in rows)
    found, absent = find_peers(("torch", "transformers"), mine)
    assert (found, len(absent)) == ([], 2)
    with pytest.raises(ConfigError, match=r"biases added; this run is of .* biases none"):
        check_comparable(layer, replace(layer, bias=Bias.NONE))
