"""A GEMM's launch on other sizes, and with NaN behind rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.definedness import Definedness
from epfuse.aot.isa.edges import _sized, _trapped, unseen
from epfuse.aot.isa.expected import Expected, compare, expected
from epfuse.aot.isa.program import Program
from epfuse.aot.isa.recorded import POISON, Launched, Recorded, regions_of

LOCAL, ROUTES, COLUMNS, OUTPUTS = 3, 5, 128, 64


def down_launch(form: torch.dtype) -> Recorded:
    """Two routes of the second expert; the rows of the others hold nothing."""
    known, rng = Definedness(), torch.Generator().manual_seed(0)
    with known:
        y, out = (torch.empty(ROUTES, size, dtype=torch.bfloat16) for size in (COLUMNS, OUTPUTS))
        y[1], y[3] = torch.arange(COLUMNS) % 5, 2.0
    w2 = torch.randint(-2, 3, (LOCAL, OUTPUTS, COLUMNS), generator=rng).to(form)
    scales = torch.full((LOCAL, OUTPUTS, COLUMNS // 32), 128, dtype=torch.uint8)
    arguments = {
        "y": y,
        "w2": w2,
        "w2_scale": None if form == torch.bfloat16 else scales,
        "bias": None,
        "topk_weights": torch.full((ROUTES, 1), 0.5),
        "out": out,
        "sorted_routes": torch.tensor([1, 3, 5, 5], dtype=torch.int32),
        "block_expert": torch.tensor([1], dtype=torch.int32),
        "num_padded": torch.tensor([4], dtype=torch.int32),
        "R": ROUTES,
        "H": OUTPUTS,
        "I": COLUMNS,
        "BLOCK_M": 4,
        "BLOCK_N": 64,
    }
    tensors = [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    program = Program("down_kernel", (), {}, {}, (), 0, 0, 8, 0, 16, 256)
    return Recorded(program, "hash", (3, 1, 1), 64, 0, arguments, (), regions_of(tensors, known))


def finished(recorded: Recorded, values: torch.Tensor) -> Launched:
    """The launch after it wrote two rows."""
    rows = torch.zeros(values.shape, dtype=torch.bool)
    rows[[1, 3]] = True
    data = torch.where(rows, values, torch.nan).view(torch.uint8).reshape(-1).numpy().copy()
    defined = rows.reshape(-1).repeat_interleave(values.element_size()).numpy()
    data[~defined] = POISON
    after = tuple(
        replace(region, data=data, defined=defined) if region.name == "out" else region for region in recorded.before
    )
    return Launched(recorded, after, LaunchCounts())


@pytest.mark.parametrize("columns", [96, 32, 0])
@pytest.mark.parametrize("form", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_launch_on_other_sizes_takes_a_part_of_the_numbers(form: torch.dtype, columns: int) -> None:
    own = down_launch(form)
    sized = _sized(own, columns, 80)
    assert sized.grid == (6, 1, 1)
    assert (sized.arguments["H"], sized.arguments["I"]) == (80, columns)
    assert sized.tensor("y").shape == (ROUTES, columns)
    assert sized.tensor("w2").shape == (LOCAL, 80, columns)
    assert sized.tensor("out").shape == (ROUTES, 80)
    assert sized.defined("y").all(1).tolist() == [columns == 0, True, columns == 0, True, columns == 0]
    assert not sized.defined("out").any()
    factor = 1.0 if form == torch.bfloat16 else 2.0
    rows = own.tensor("w2")[1, torch.arange(80) * 64 // 80, :columns].float() * factor
    want = own.tensor("y")[[1, 3], :columns].float() @ rows.T / 2
    torch.testing.assert_close(expected(sized)["out"].values[[1, 3]].float(), want)


def test_what_lies_behind_a_row_is_nan_in_a_trapped_launch() -> None:
    trapped = _trapped(down_launch(torch.float8_e4m3fnuz))
    assert trapped.tensor("y")[:, 0].isnan().tolist() == [True, False, True, False, True]
    assert trapped.defined("y")[:, 0].tolist() == [False, True, False, True, False]  # what nothing wrote stays so
    codes, scales = trapped.tensor("w2").view(torch.uint8), trapped.tensor("w2_scale")
    for expert, first in enumerate((0, 0, 1)):  # other rows in the second pair of experts
        assert (codes[expert, first::2, 0] == 0x80).all()
        assert (scales[expert, first::2, 0] == 255).all()
        assert not (codes[expert, 1 - first :: 2] == 0x80).any()
        assert not (scales[expert, 1 - first :: 2] == 255).any()
    assert not (scales[:, :, 1:] == 255).any()
    values = expected(trapped)["out"].values[[1, 3]]
    assert values[:, ::2].isnan().all()
    assert not values[:, 1::2].isnan().any()
    assert compare(finished(trapped, expected(trapped)["out"].values), expected(trapped)) == []
    spoiled = expected(trapped)["out"].values
    spoiled[1, 1] = torch.nan  # as if a column of the next row had been read
    [found] = compare(finished(trapped, spoiled), expected(trapped))
    assert found.wrong == 1


@pytest.mark.parametrize(
    "nan",
    [
        # a row of scales is all of an expert's: those of every second expert
        [[False], [True], [False], [True]],
        # of two rows each is a number with one of experts 0 and 2, and the first one with expert 0
        [[False, True], [False, True], [True, False], [True, False]],
    ],
)
def test_the_scales_of_no_block_are_nan_with_every_expert(nan: list[list[bool]]) -> None:
    own, scales = down_launch(torch.float8_e4m3fnuz), torch.ones(4, len(nan[0]), 1)
    regions = [region for region in own.before if region.name != "w2_scale"]
    own = replace(
        own,
        arguments=own.arguments | {"w2_scale": scales, "SCALE_ROWS": 128},
        before=(*regions, *regions_of([("w2_scale", scales)], Definedness())),
    )
    assert _trapped(own).tensor("w2_scale")[..., 0].isnan().tolist() == nan


def test_pairs_of_outputs_that_are_nan_in_every_row_are_counted() -> None:
    values, written = torch.zeros(3, 4), torch.tensor([True, True, False])[:, None].expand(3, 4)
    assert unseen(Expected(values, written)) == 0
    values[:2, 1] = values[0, 2] = values[1, 3] = torch.nan
    assert unseen(Expected(values, written)) == 0
    values[:2, 0] = torch.nan  # a number is left in the row that nothing writes
    assert unseen(Expected(values, written)) == 1


def test_codes_whose_nan_is_read_as_a_number_are_left_alone() -> None:
    own = down_launch(torch.float8_e4m3fn)
    trapped = _trapped(own)
    assert torch.equal(trapped.tensor("w2").view(torch.uint8), own.tensor("w2").view(torch.uint8))
    assert (trapped.tensor("w2_scale")[:2, ::2, 0] == 255).all()
