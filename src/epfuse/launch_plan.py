"""Launch plans: all that a call launches, but the addresses, kept for later calls of the same kind.

Outside a CUDA graph the host takes longer for a call of few tokens than the GPU does: families lay out memory,
launchers work out arguments, and Triton finds out anew which compiled kernel they want. All of that follows from the
kind of a call (its sizes, dtypes, tiles and device) and from no address. So the second call of a kind is watched while
it runs, and later ones put their addresses into what it launched. A plan holds no tensor: layers of the same sizes
share it, and nothing has to be forgotten when weights move.

What a plan launches is Triton's ``CompiledKernel[grid]``, which Triton 3.6 and 3.7 have alike and which runs launch
hooks. On AMD there are no plans: which kernel Triton takes there depends on how far a tensor's memory reaches, too.

EPFUSE_LAUNCH_PLANS=0 switches plans off.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from epfuse.environment import environment
from epfuse.families.family import LayerCall, Step
from epfuse.launch_record import Record, WatchedLaunch, recording
from epfuse.operands import overlaps
from epfuse.stages.extent import ALIGNMENT
from epfuse.target import Target, target_of
from epfuse.weights.projections import stack_tensors

if TYPE_CHECKING:
    from epfuse.policy.decision import Decision

MOST_PLANS = 256
"""Kinds of calls that are remembered. A plan takes some kilobytes."""
LARGE = 10 * 2**20
"""Bytes from which on a buffer of a call is allocated by itself, as torch's allocator keeps such apart from others;
smaller ones share an allocation."""
APART = 512
"""Buffers that share an allocation begin at multiples of so many bytes, as torch's allocations do."""
MOST_ADDRESSES = 256
"""Addresses of an operand for which the copy engine's view of it is kept."""

Place: TypeAlias = tuple[int, int]
"""Which of a call's operands, or which buffer behind them, and how many bytes from its begin."""


class _Address:
    """Stands for a tensor where Triton asks for its address alone."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address: int = address

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class _Lines:
    """A tensor descriptor, but for the address of what it describes."""

    def __init__(self, descriptor: Any) -> None:
        self._kind = type(descriptor)
        self._fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.made: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        """A new descriptor of what lies at ``address``, kept in ``made``."""
        found = object.__new__(self._kind)  # its checks were made when the call was watched
        vars(found).update(self._fields, base=_Address(address))
        if len(self.made) >= MOST_ADDRESSES:
            self.made.clear()
        self.made[address] = found
        return found


class PlannedLaunch:
    """One launch, but for the addresses.

    Args:
        launched: what was watched.
        places: of its tensors: argument's index -> place.
    """

    def __init__(self, launched: WatchedLaunch, places: dict[int, Place]) -> None:
        grid, arguments = launched.grid, launched.arguments
        self._run = launched.compiled[(*grid, 1, 1)[:3]]
        self._arguments = [None if index in places else value for index, value in enumerate(arguments)]
        lines = {index: _Lines(arguments[index]) for index in places if _is_descriptor(arguments[index])}
        self._lines = [(index, *places[index], lines[index]) for index in lines]
        self._pointers = [(index, *place) for index, place in places.items() if index not in lines]
        self._numbers = [index for index, value in enumerate(arguments) if isinstance(value, tuple)]

    def __call__(self, addresses: Sequence[int], numbers: tuple[float, ...], stream: int) -> None:
        """Launch it.

        Args:
            addresses: of the call's operands, then of its buffers.
            numbers: the activation's.
            stream: the handle of a stream.
        """
        arguments = self._arguments.copy()
        for index, operand, offset in self._pointers:
            arguments[index] = addresses[operand] + offset
        for index, operand, offset, lines in self._lines:
            address = addresses[operand] + offset
            arguments[index] = lines.made.get(address) or lines.at(address)
        for index in self._numbers:
            arguments[index] = numbers
        self._run(*arguments, stream=stream)


class LaunchPlan(NamedTuple):
    """What calls of one kind launch.

    Attributes:
        steps: the launches of each step, with the step's name.
        allocations: bytes of each.
        buffers: allocation and offset of each buffer.
        decision: that the calls run on; held, because the kind names it by its identity.
    """

    steps: tuple[tuple[str, tuple[PlannedLaunch, ...]], ...]
    allocations: tuple[int, ...]
    buffers: tuple[Place, ...]
    decision: Decision


_UNKNOWN = object()
"""In place of a kind's plan; None says that it can have none."""


class Plans:
    """The plans of this process.

    Args:
        most: kinds of calls that are remembered; the oldest is forgotten for a new one.
    """

    def __init__(self, most: int = MOST_PLANS) -> None:
        self._most = most
        self._plans: dict[tuple[Any, ...], LaunchPlan | None] = {}
        self._seen: dict[tuple[Any, ...], None] = {}
        self._adding = threading.Lock()

    def steps(self, decision: Decision, call: LayerCall) -> Iterable[Step]:
        """The launches of a call, in order, each to be run once."""
        assert decision.family is not None
        assert decision.tiles is not None
        if not can_plan(call):
            return decision.family.steps(call, decision.tiles).launches
        make = partial(decision.family.steps, call, decision.tiles)
        operands = _operands(call)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
        if functools.reduce(operator.or_, addresses) % ALIGNMENT:  # one of them is not aligned, and has other kernels
            return make().launches
        driver = _triton_driver().active
        device = driver.get_current_device()
        kind = (*_kind(decision, call, operands), device)
        plan = self._plans.get(kind, _UNKNOWN)
        if isinstance(plan, LaunchPlan):
            return _planned(plan, addresses, call, driver.get_current_stream(device))
        if plan is _UNKNOWN and kind in self._seen:
            return self._watched(kind, decision, call, operands, make)
        if plan is _UNKNOWN:
            self._add(self._seen, kind, None)
        return make().launches

    def _watched(
        self,
        kind: tuple[Any, ...],
        decision: Decision,
        call: LayerCall,
        operands: Sequence[torch.Tensor | None],
        make: Callable[[], Any],
    ) -> Iterator[Step]:
        """The launches of a call; after the last one it is known whether its kind has a plan, and which."""
        records: list[tuple[str, Record]] = [("", Record())]
        with recording(records[0][1]):
            launches = make().launches
        for name, launch in launches:
            records.append((name, Record()))
            yield name, partial(_run_recorded, records[-1][1], launch)
        self._add(self._plans, kind, _plan(decision, records, operands, call))

    def _add(self, to: dict[tuple[Any, ...], Any], kind: tuple[Any, ...], value: Any) -> None:
        with self._adding:
            while len(to) >= self._most:
                del to[next(iter(to))]
            to[kind] = value


PLANS = Plans()


def can_plan(call: LayerCall) -> bool:
    """Whether a call's launches follow from its kind, and plans are wanted."""
    device = call.hidden.device
    return environment().launch_plans and device.type == "cuda" and target_of(device) is Target.SM90


@functools.cache
def _triton_driver() -> Any:
    """What knows Triton's driver; without a GPU nobody asks for it."""
    from triton.runtime import driver

    return driver


def _operands(call: LayerCall) -> list[torch.Tensor | None]:
    """The tensors of a call; None for one that it has not."""
    scratch = call.scratch
    return [
        call.hidden,
        call.topk_weights,
        call.topk_ids,
        call.slots,
        call.out,
        None if scratch is None else scratch.y,
        None if scratch is None else scratch.routed,
        call.gate_up_bias,
        call.down_bias,
        *stack_tensors(call.w13),
        *stack_tensors(call.w2),
    ]


def _kind(decision: Decision, call: LayerCall, operands: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """All that a call's launches follow from."""
    assert decision.family is not None
    scratch, (tokens, top_k) = call.scratch, call.topk_ids.shape
    in_out: tuple[bool, ...] = ()
    if scratch is not None and overlaps(scratch.y, call.out):  # all of y, or as much as the call needs
        needed = decision.family.scratch(tokens, top_k, call.shape.hidden, call.shape.intermediate).y
        in_out = (True, overlaps(scratch.y.view(-1)[:needed], call.out))
    dtypes = [None if tensor is None else tensor.dtype for tensor in operands]
    activation = (type(call.activation), call.activation.bounded)
    return (id(decision), tokens, call.shape, *activation, call.combine, call.hidden.device, in_out, *dtypes)


def _planned(plan: LaunchPlan, addresses: list[int], call: LayerCall, stream: int) -> Iterator[Step]:
    """The launches of a plan on a call's addresses."""
    memory = [torch.empty(size, dtype=torch.uint8, device=call.hidden.device) for size in plan.allocations]
    begins = [tensor.data_ptr() for tensor in memory]
    addresses.extend([begins[allocation] + offset for allocation, offset in plan.buffers])
    numbers = call.activation.parameters
    for name, launches in plan.steps:
        yield name, partial(_run_all, launches, addresses, numbers, stream)
    del memory  # until here its launches are in the stream


def _run_all(
    launches: tuple[PlannedLaunch, ...], addresses: Sequence[int], numbers: tuple[float, ...], stream: int
) -> None:
    for launch in launches:
        launch(addresses, numbers, stream)


def _run_recorded(record: Record, launch: Callable[[], object]) -> None:
    with recording(record):
        launch()


def _is_descriptor(value: object) -> bool:
    return isinstance(getattr(value, "base", None), torch.Tensor) and not isinstance(value, torch.Tensor)


def _plan(
    decision: Decision,
    records: Sequence[tuple[str, Record]],
    operands: Sequence[torch.Tensor | None],
    call: LayerCall,
) -> LaunchPlan | None:
    """A plan of what was watched; None if another call of the kind could be unlike it."""
    (_, made), *steps = records
    if made.launches or not all(record.is_whole for _, record in records):
        return None
    storages: dict[int, torch.UntypedStorage] = {}
    found = []
    for name, record in steps:
        planned = [_planned_launch(launched, operands, call, storages) for launched in record.launches]
        if not planned or None in planned:
            return None
        found.append((name, tuple(launch for launch in planned if launch is not None)))
    allocations, buffers = _laid_out([storage.nbytes() for storage in storages.values()])
    return LaunchPlan(tuple(found), allocations, buffers, decision)


def _planned_launch(
    launched: WatchedLaunch,
    operands: Sequence[torch.Tensor | None],
    call: LayerCall,
    storages: dict[int, torch.UntypedStorage],
) -> PlannedLaunch | None:
    """One launch; adds to ``storages``, of the buffers that the call has allocated."""
    places: dict[int, Place] = {}
    for index, value in enumerate(launched.arguments):
        if isinstance(value, tuple):
            if value != call.activation.parameters:
                return None
            continue
        tensor = value.base if _is_descriptor(value) else value
        if isinstance(tensor, torch.Tensor):
            place = _place(tensor, operands, call.out, storages)
            if place is None:
                return None
            places[index] = place
        elif hasattr(value, "data_ptr"):
            return None
    return None if launched.compiled is None else PlannedLaunch(launched, places)


def _place(
    tensor: torch.Tensor,
    operands: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    storages: dict[int, torch.UntypedStorage],
) -> Place | None:
    """Where an argument lies: in an operand, or in a buffer that the call has allocated; None if that is not clear.

    ``scratch.y`` may lie in ``out``. Launches are given ``out`` itself, and parts of y.
    """
    begin, within = tensor.data_ptr(), []
    same = [index for index, operand in enumerate(operands) if operand is tensor]
    if same:  # if it is two operands at once, another call may have a tensor for each
        return (same[0], 0) if len(same) == 1 else None
    for index, operand in enumerate(operands):
        if operand is not None and operand.data_ptr() <= begin < operand.data_ptr() + operand.nbytes:
            within.append(index)
    if len(within) > 1:
        within = [index for index in within if operands[index] is not out]
    if within:
        (first, *more) = within
        operand = operands[first]
        assert operand is not None
        return None if more else (first, begin - operand.data_ptr())
    storage = tensor.untyped_storage()
    storages.setdefault(storage._cdata, storage)
    return len(operands) + list(storages).index(storage._cdata), begin - storage.data_ptr()


def _laid_out(sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[Place, ...]]:
    """Bytes of each allocation, and where in them buffers of such sizes lie."""
    allocations, buffers, shared = [0], [], 0
    for size in sizes:
        if size >= LARGE:
            buffers.append((len(allocations), 0))
            allocations.append(size)
        else:
            buffers.append((0, shared))
            shared += -(-size // APART) * APART
    allocations[0] = shared
    return tuple(allocations), tuple(buffers)
