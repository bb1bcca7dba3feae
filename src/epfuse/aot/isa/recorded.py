"""One launch with the bytes that it was given: it can be run, and run again with another program."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.definedness import Definedness
from epfuse.aot.isa.kernarg import flatten, kernarg
from epfuse.aot.isa.memory import BASE, Memory
from epfuse.aot.isa.program import Program
from epfuse.aot.isa.run import launch

POISON = 0xFF
"""What undefined bytes are: NaN in BF16, FP16 and FP32, -1 in integers."""
MOST_ALIGNED = 16
"""Bytes: Triton specialises kernels on pointers that are multiples of it, and on no more."""


@dataclass(frozen=True)
class Region:
    """Adjacent bytes that a launch may read and write: one tensor's, or those of several that overlap.

    Attributes:
        name: the first of the kernel's arguments that lie in it.
        storage: of the host.
        start: first byte in it.
        data: the bytes.
        defined: whether something wrote each of them.
    """

    name: str
    storage: torch.UntypedStorage
    start: int
    data: npt.NDArray[np.uint8]
    defined: npt.NDArray[np.bool_]

    def to_host(self, defined: Definedness) -> None:
        """Write the bytes to the host's storage."""
        stop = self.start + self.data.size
        host_bytes(self.storage)[self.start : stop] = self.data
        mask = defined.mask(self.storage)
        if mask is not None:
            mask[self.start : stop] = self.defined

    @property
    def align(self) -> int:
        """What the host's address is a multiple of, as far as a kernel may know."""
        address = self.storage.data_ptr() + self.start
        return min(address & -address, MOST_ALIGNED)

    def place(self, memory: Memory) -> int:
        """Place the bytes; returns their address."""
        address = memory.place(self.data, self.name, align=self.align)
        memory.undefined[address - BASE :][: self.data.size][~self.defined] = 255
        return address

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor begins in the region."""
        first = tensor.storage_offset() * tensor.element_size() - self.start
        return self.storage.data_ptr() == tensor.untyped_storage().data_ptr() and 0 <= first < self.data.size


@dataclass(frozen=True)
class Recorded:
    """One launch, before it runs.

    Attributes:
        program: the machine code.
        hash: Triton's, of source, constants, specialisation and options.
        grid: workgroups.
        threads: of a workgroup.
        lds_bytes: that the launch asks for.
        arguments: name -> value, constants too.
        types: Triton's, of each of them.
        before: the tensors' bytes.
    """

    program: Program
    hash: str
    grid: tuple[int, int, int]
    threads: int
    lds_bytes: int
    arguments: dict[str, Any]
    types: tuple[Any, ...]
    before: tuple[Region, ...]

    def run(
        self, program: Program | None = None, seed: int = 0, watch: Callable[[Launched], None] | None = None
    ) -> Launched:
        """Execute every workgroup.

        Args:
            program: to run in the place of the launch's own.
            seed: of the order in which waves and workgroups advance.
            watch: called with what is there so far after each workgroup that wrote; what it raises ends the launch.

        Raises:
            IsaError: the program does what it may not, or something that the model does not know.
        """
        program = program or self.program
        memory = Memory()
        addresses = [region.place(memory) for region in self.before]
        flat = flatten(self.types, list(self.arguments.values()))
        values = [(kind, self._value(value, addresses)) for kind, value in flat]
        segment = kernarg(program, values, self.grid, self.threads, self.lds_bytes)
        stored = 0

        def see(counts: LaunchCounts) -> None:
            nonlocal stored
            if watch is not None and counts.stored.total() > stored:
                stored = counts.stored.total()
                watch(self._launched(memory, addresses, counts))

        counts = launch(program, self.grid, self.threads, segment, memory, seed, lds_bytes=self.lds_bytes, watch=see)
        return self._launched(memory, addresses, counts)

    def _launched(self, memory: Memory, addresses: list[int], counts: LaunchCounts) -> Launched:
        after = []
        for region, address in zip(self.before, addresses, strict=True):
            size = region.data.size
            defined = ~memory.undefined_bytes(address, size)
            after.append(replace(region, data=memory.read(address, size), defined=defined))
        return Launched(self, tuple(after), counts)

    def given(
        self, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]], sizes: dict[str, int], grid: tuple[int, int, int]
    ) -> Recorded:
        """The same code launched on other arguments.

        Args:
            tensors: argument -> its values, and which of them are defined.
            sizes: arguments that are integers.
            grid: workgroups.
        """
        arguments, before = self.arguments | sizes, list(self.before)
        for name, (values, defined) in tensors.items():
            values = values.contiguous()
            before = [region for region in before if not region.holds(arguments[name])]
            arguments[name] = values
            if values.numel():
                data = host_bytes(values.untyped_storage())[: values.nbytes].copy()
                marks = defined.reshape(-1).repeat_interleave(values.element_size()).numpy()
                data[~marks] = POISON
                before.append(Region(name, values.untyped_storage(), 0, data, marks))
        return replace(self, grid=grid, arguments=arguments, before=tuple(before))

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of an argument's tensor as it was before."""
        return _tensor(self.arguments[name], self.before)[0]

    def defined(self, name: str) -> torch.Tensor:
        """Which elements of an argument's tensor were defined before."""
        return _tensor(self.arguments[name], self.before)[1]

    def _value(self, value: Any, addresses: list[int]) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.numel() == 0:
            return 0
        [place] = [index for index, region in enumerate(self.before) if region.holds(value)]
        return addresses[place] + value.storage_offset() * value.element_size() - self.before[place].start


@dataclass(frozen=True)
class Launched:
    """One launch, after it ran.

    Attributes:
        recorded: what ran.
        after: the tensors' bytes.
        counts: what the waves did.
    """

    recorded: Recorded
    after: tuple[Region, ...]
    counts: LaunchCounts

    def tensor(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of an argument's tensor, and which of its elements are defined."""
        return _tensor(self.recorded.arguments[name], self.after)


def _tensor(like: torch.Tensor, regions: Sequence[Region]) -> tuple[torch.Tensor, torch.Tensor]:
    if like.numel() == 0:
        return torch.empty_like(like), torch.empty(like.shape, dtype=torch.bool)
    [region] = [region for region in regions if region.holds(like)]
    size = like.element_size()
    first = like.storage_offset() * size - region.start
    whole = (region.data.size - first) // size * size
    data = torch.from_numpy(region.data[first : first + whole].copy()).view(like.dtype)
    defined = torch.from_numpy(region.defined[first : first + whole].reshape(-1, size).all(1))
    return tuple(flat.as_strided(like.shape, like.stride()) for flat in (data, defined))  # type: ignore[return-value]


def regions_of(tensors: Sequence[tuple[str, torch.Tensor]], known: Definedness) -> tuple[Region, ...]:
    """The bytes of named tensors as they are now, those that overlap in one region."""
    spans: dict[int, tuple[torch.UntypedStorage, list[tuple[int, int, str]]]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            storage, size = tensor.untyped_storage(), tensor.element_size()
            first = int(tensor.storage_offset()) * size
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = first + size * (1 + sum((int(count) - 1) * int(step) for count, step in steps))
            spans.setdefault(storage.data_ptr(), (storage, []))[1].append((first, last, name))
    regions = []
    for storage, ranges in spans.values():
        for start, stop, name in _merged(ranges):
            data = host_bytes(storage)[start:stop].copy()
            mask = known.mask(storage)
            defined = np.ones(data.size, np.bool_) if mask is None else mask[start:stop].copy()
            data[~defined] = POISON
            regions.append(Region(name, storage, start, data, defined))
    return tuple(regions)


def host_bytes(storage: torch.UntypedStorage) -> npt.NDArray[np.uint8]:
    """The storage's memory itself."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


def _merged(ranges: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    merged: list[tuple[int, int, str]] = []
    for start, stop, name in sorted(ranges):
        if merged and start < merged[-1][1]:
            first, last, before = merged[-1]
            merged[-1] = first, max(stop, last), before
        else:
            merged.append((start, stop, name))
    return merged
