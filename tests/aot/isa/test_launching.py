"""What surrounds the model: a launch's arguments, bytes that nothing wrote, regions, expectations."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.definedness import Definedness
from epfuse.aot.isa.errors import ExecutionError
from epfuse.aot.isa.expected import compare, expected
from epfuse.aot.isa.kernarg import flatten, kernarg
from epfuse.aot.isa.program import Argument, Program
from epfuse.aot.isa.recorded import Launched, Recorded, regions_of


def program(*arguments: tuple[int, int, str], name: str = "combine_kernel") -> Program:
    """A kernel of no instructions with such (offset, size, kind) arguments."""
    size = max((offset + size for offset, size, _ in arguments), default=0)
    return Program(name, (), {}, {}, tuple(Argument(*each) for each in arguments), size, 0, 8, 0, 16, 256)


SCRATCH = ((24, 8, "global_buffer"), (32, 8, "global_buffer"))


def test_arguments_lie_where_the_metadata_says() -> None:
    kernel = program((0, 8, "global_buffer"), (8, 4, "by_value"), (12, 4, "by_value"), (16, 4, "by_value"), *SCRATCH)
    values = flatten(["*bf16", "constexpr", "i32", ("fp32", "fp32")], [0x7E4000001000, 5, -2, (1.5, 7.0)])
    segment = kernarg(kernel, values, (3, 2, 1), 256, 1024)
    assert segment == struct.pack("<Qiff4xQQ", 0x7E4000001000, -2, 1.5, 7.0, 0, 0)


def test_hidden_arguments_are_the_launchs() -> None:
    hidden = ("hidden_block_count_x", "hidden_block_count_y", "hidden_group_size_x", "hidden_dynamic_lds_size")
    kernel = program(
        (0, 8, "global_buffer"),
        (8, 8, "global_buffer"),
        *((16 + 4 * place, 4, kind) for place, kind in enumerate(hidden)),
    )
    assert struct.unpack("<QQIIII", kernarg(kernel, [], (3, 2, 1), 256, 1024)) == (0, 0, 3, 2, 256, 1024)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([("i32", 1)], "takes 4 bytes at 4; the launch has 8"),
        ([("i32", 1), ("i32", 2), ("*u8", 3)], "the launch has 1 arguments more than combine_kernel takes"),
        ([("i64", 1), ("i32", 2)], "takes 4 bytes at 0; the launch has 8"),
        ([("tensordesc", 1), ("i32", 2)], "Triton's type tensordesc"),
    ],
)
def test_other_arguments_are_refused(values: list[tuple[str, object]], message: str) -> None:
    kernel = program((0, 4, "by_value"), (4, 4, "by_value"), (8, 8, "global_buffer"), (16, 8, "global_buffer"))
    with pytest.raises(ExecutionError, match=message):
        kernarg(kernel, values, (1, 1, 1), 64, 0)


def test_an_unknown_hidden_argument_is_refused() -> None:
    with pytest.raises(ExecutionError, match="hidden_queue_ptr, which is not known"):
        kernarg(program((0, 8, "hidden_queue_ptr")), [], (1, 1, 1), 64, 0)


def test_what_empty_returns_is_undefined_until_something_writes_it() -> None:
    known = Definedness()
    with known:
        rows = torch.empty(4, 6)
        rows[1, 2:4] = 1.0
        like, made = torch.empty_like(rows), torch.zeros(3)
        like.view(torch.uint8)[0, :4] = 0
        new = made.new_empty(5).fill_(2.0)
    assert known.undefined(rows) == 22
    assert known.undefined(rows[1, 2:4]) == 0
    assert known.undefined(like) == 23
    assert known.undefined(made) == known.undefined(new) == 0


def test_regions_are_the_tensors_own_bytes() -> None:
    known, storage = Definedness(), torch.arange(64, dtype=torch.float32)
    a, b, c = storage[4:12], storage[10:20], storage[32:40].view(4, 2)[:, :1]
    regions = regions_of([("a", a), ("b", b), ("c", c), ("none", storage[:0])], known)
    spans = {region.name: (region.start // 4, region.start // 4 + region.data.size // 4) for region in regions}
    assert spans == {"a": (4, 20), "c": (32, 39)}  # a and b overlap; c ends where its last element does
    assert all(region.defined.all() for region in regions)
    assert [region.holds(b) for region in regions] == [True, False]


def combine_launch() -> Recorded:
    """A launch of combine on two tokens, one of whose four routes is local."""
    known = Definedness()
    with known:
        routed, out = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(2, 8, dtype=torch.bfloat16)
        routed[1] = torch.arange(8)
    arguments = {
        "routed": routed,
        "topk_ids": torch.tensor([[1, 0], [3, -1]], dtype=torch.int32),
        "expert_map": torch.tensor([0, -1, -1, -1], dtype=torch.int32),
        "out": out,
    }
    regions = regions_of(list(arguments.items()), known)
    return Recorded(program(), "hash", (2, 1, 1), 64, 0, arguments, (), regions)


def finished(recorded: Recorded, values: torch.Tensor) -> Launched:
    """The launch after it wrote ``values`` to out."""
    data = values.contiguous().view(torch.uint8).reshape(-1).numpy().copy()
    after = [
        replace(region, data=data, defined=np.ones(data.size, np.bool_)) if region.name == "out" else region
        for region in recorded.before
    ]
    return Launched(recorded, tuple(after), LaunchCounts())


def test_a_launch_is_held_against_its_stages_reference() -> None:
    recorded = combine_launch()
    wanted = expected(recorded)
    right = torch.zeros(2, 8, dtype=torch.bfloat16)
    right[0] = torch.arange(8)
    assert compare(finished(recorded, right), wanted) == []
    wrong = right.clone()
    wrong[1, 3] = 2.0**-100
    [found] = compare(finished(recorded, wrong), wanted)
    assert (found.argument, found.wrong, found.missing, found.stray) == ("out", 1, 0, 0)
    assert "[1, 3]" in str(found)
    [lost] = compare(Launched(recorded, recorded.before, LaunchCounts()), wanted)
    assert lost.missing == 16


def test_an_input_that_changes_is_a_mismatch() -> None:
    recorded = combine_launch()
    done = finished(recorded, torch.zeros(2, 8, dtype=torch.bfloat16))
    after = [replace(region, data=region.data.copy()) for region in done.after]
    next(region for region in after if region.name == "topk_ids").data[4] += 1
    found = compare(replace(done, after=tuple(after)), expected(recorded))
    assert [(each.argument, each.stray) for each in found if each.argument != "out"] == [("topk_ids", 1)]
