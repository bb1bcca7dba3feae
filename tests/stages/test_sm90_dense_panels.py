"""What the copy engine brings of dense weights, by descriptors and coordinates: on a CPU, which has no such engine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton.experimental.gluon")

from epfuse.errors import LayoutError
from epfuse.stages import sm90_dense_gemm, sm90_dense_launch
from epfuse.weights.panels import RowOrder, source_rows
from tests.stages.plain_gluon import PlainLanguage, plain

ROWS, STEP = 64, 64


class Language(PlainLanguage):
    """With what copies use."""

    bfloat16 = torch.bfloat16
    static_range = range


class Place:
    """The memory of one panel, in whatever shape."""

    def __init__(self) -> None:
        self.lines: torch.Tensor | None = None

    def _reinterpret(self, dtype: object, shape: list[int], layout: object) -> Place:
        return self


class Engine:
    """Panels and barriers of one program, and its copy engine: zeros where a box leaves its tensor."""

    def __init__(self) -> None:
        self.places: dict[int, Place] = {}
        self.expected = 0
        self.came = 0

    def index(self, number: int) -> Place:
        return self.places.setdefault(number, Place())

    def expect(self, barrier: object, bytes_: int) -> None:
        self.expected += bytes_

    def async_copy_global_to_shared(self, tensor: Any, first: list[int], barrier: object, place: Place) -> None:
        axes = [torch.arange(size) + at for size, at in zip(tensor.block_shape, first, strict=True)]
        at = torch.meshgrid(*axes, indexing="ij")
        inside = torch.stack([(one >= 0) & (one < size) for one, size in zip(at, tensor.shape, strict=True)]).all(0)
        where = sum(one * stride for one, stride in zip(at, tensor.strides, strict=True))
        values = tensor.base.reshape(-1)[torch.where(inside, where, 0)]
        place.lines = torch.where(inside, values, 0).reshape(ROWS, STEP)
        self.came += 2 * place.lines.numel()


@pytest.mark.parametrize(("hidden", "intermediate"), [(80, 48), (128, 96)])
@pytest.mark.parametrize("panels", [2, 3, 4])
@pytest.mark.parametrize("order", list(RowOrder))
def test_panels_have_the_rows_that_belong_together(order: RowOrder, hidden: int, intermediate: int, panels: int):
    """As weights in panels have them (`source_rows`); zeros past K, and of what is past N nobody asks."""
    local, gated = 3, order is RowOrder.GATE_UP
    weights = torch.randn(local, *((2 * intermediate, hidden) if gated else (hidden, intermediate))).bfloat16()
    rows, columns = weights.shape[1:]
    describe = sm90_dense_launch.gate_up_panels if gated else sm90_dense_launch.down_panels
    fetch, counted = ("fetch_gate_up", rows // 8) if gated else ("fetch_down", rows)
    packed = source_rows(rows, order)
    constants = {"PANEL": ROWS, "RUN": 8, "BLOCK_K": STEP, "line_layout": lambda rank: None}
    for expert in range(local):
        for tile in range(-(-rows // (ROWS * panels))):
            for step in range(-(-columns // STEP)):
                engine, stage = Engine(), 1
                with plain(sm90_dense_gemm, machine=Language, mbarrier=engine, tma=engine, **constants):
                    getattr(sm90_dense_gemm, fetch)(
                        describe(weights), engine, engine, stage, expert, tile * panels, step, counted, panels
                    )
                assert engine.expected == engine.came
                for panel in range(panels):
                    sources = packed[(tile * panels + panel) * ROWS :][:ROWS]
                    live = torch.zeros(ROWS, dtype=torch.bool)
                    live[: sources.numel()] = sources >= 0
                    want = torch.zeros(ROWS, STEP, dtype=torch.bfloat16)
                    wanted = weights[expert, sources[sources >= 0], step * STEP :][:, :STEP]
                    want[live, : wanted.shape[1]] = wanted
                    lines = engine.places[stage * panels + panel].lines
                    assert lines is not None
                    assert torch.equal(lines[live], want[live])


@pytest.mark.parametrize("describe", [sm90_dense_launch.gate_up_panels, sm90_dense_launch.down_panels])
def test_weights_are_described_where_they_lie_now(describe: Callable[[torch.Tensor], Any]) -> None:
    weights = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    first = describe(weights)
    assert first.base.data_ptr() == weights.data_ptr()
    weights.data = torch.ones(2, 64, 64, dtype=torch.bfloat16)
    moved = describe(weights)
    assert moved.base.data_ptr() == weights.data_ptr() != first.base.data_ptr()
    assert (moved.shape, moved.strides) == (first.shape, first.strides)
    weights.data = weights.data.view(1, 128, 64)  # at the same address
    fresh = describe(weights.clone())
    assert (describe(weights).shape, describe(weights).strides) == (fresh.shape, fresh.strides)


@pytest.mark.parametrize("describe", [sm90_dense_launch.gate_up_panels, sm90_dense_launch.down_panels])
def test_memory_that_a_parameter_gives_up_is_free(describe: Callable[[torch.Tensor], Any]) -> None:
    """`model.to("cpu")` gives each parameter other data: what is known of it must not hold the GPU's."""
    weights = torch.nn.Parameter(torch.zeros(2, 64, 64, dtype=torch.bfloat16), requires_grad=False)
    describe(weights)
    before = StorageWeakRef(weights.untyped_storage())
    weights.data = torch.empty(0, dtype=torch.bfloat16)
    gc.collect()
    assert before.expired()


def test_weights_that_the_copy_engine_does_not_take_are_refused() -> None:
    weights = torch.zeros(2 * 64 * 64 + 8, dtype=torch.bfloat16)
    sm90_dense_launch.down_panels(weights[8:].view(2, 64, 64))
    with pytest.raises(LayoutError, match="multiples of 16 bytes"):
        sm90_dense_launch.down_panels(weights[4:-4].view(2, 64, 64))


def test_what_is_described_goes_with_the_weights() -> None:
    weights = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    known = (sm90_dense_launch._gate_up, sm90_dense_launch._down)
    before = [len(one) for one in known]
    sm90_dense_launch.gate_up_panels(weights)
    sm90_dense_launch.down_panels(weights)
    assert [len(one) for one in known] == [count + 1 for count in before]
    del weights
    gc.collect()
    assert [len(one) for one in known] == before
