"""A Hopper GPU that does nothing: the CPU's memory stands for its, kernels are not compiled, and launches are noted.

All that is Python of a call runs as it does on a GPU: epfuse's, Triton's binder, key and launcher. What Triton's module
in C would do is left out: encoding tensor descriptors and the launch itself. It patches names that all versions of
epfuse have, so that an older one can be measured beside this one.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton.compiler
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from epfuse.aot import launches
from epfuse.target import Target

_NoDevice: Any = getattr(launches, "NoDevice", None) or launches._NoDevice  # as older versions call it
_NUMBERS = itertools.count(7001)
"""Of such devices. Triton keeps by them what it has compiled: they are no real one's, and each has its own."""
PRODUCT = "NVIDIA H200"
_IN_C: Callable[..., object] = "".format
"""Takes any arguments and does nothing, without a call of Python's."""


class StubLaunch(NamedTuple):
    """One launch, as Triton's launcher gets it.

    Attributes:
        kernel: its name.
        made_of: types, constants, attributes and options that it is compiled for.
        grid: numbers of programs.
        stream: handle.
        arguments: a value for each parameter.
    """

    kernel: str
    made_of: str
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class StubGPU(_NoDevice):
    """Triton's driver of such a GPU.

    Attributes:
        number: the device's.
        stream: the current stream's handle.
        launches: what was launched; None to note nothing.
        compiled: how many kernels would have been compiled.
    """

    def __init__(self) -> None:
        super().__init__(Target.SM90)
        self.utils = SimpleNamespace(fill_tma_descriptor=_IN_C, fill_tma_descriptor_tiled=_IN_C)
        self.number = next(_NUMBERS)
        self.stream = 0
        self.launches: list[StubLaunch] | None = None
        self.compiled = 0

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return self.stream


class StubKernel(CompiledKernel):
    """A kernel that was not compiled. How it is launched is Triton's."""

    def __init__(self, gpu: StubGPU, source: Any, options: dict[str, Any]) -> None:
        self.src, self.name, self.hash = source, source.fn.__name__, "none"
        self.metadata, self.packed_metadata = SimpleNamespace(), (4, 1, 0)
        self.module, self.function, self._gpu = object(), 1, gpu
        kinds = source.signature
        options = {name: value for name, value in options.items() if name != "extern_libs"}
        self.made_of = repr(
            [sorted(map(repr, what.items())) for what in (kinds, source.constants, source.attrs, options)]
        )
        launcher = object.__new__(nvidia.CudaLauncher)
        launcher.num_ctas, launcher.arg_annotations, launcher.kernel_signature = 1, None, None
        launcher.global_scratch_size = launcher.profile_scratch_size = 0
        launcher.global_scratch_align = launcher.profile_scratch_align = 1
        launcher.launch_cooperative_grid, launcher.launch_pdl = False, True
        encoded = {"swizzle": 3, "elem_size": 1, "elem_type": 1, "block_size": [1, 1], "fp4_padded": False}
        described = sum(isinstance(kind, str) and kind.startswith("tensordesc") for kind in kinds.values())
        launcher.launch = nvidia.wrap_handle_tensordesc(_IN_C, kinds, [encoded] * described)
        self._run: Any = launcher

    def _init_handles(self) -> None:
        """There are none."""

    @property
    def run(self) -> Any:
        return self._run if self._gpu.launches is None else self._noted

    def _noted(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, *rest: Any
    ) -> None:
        enter, leave, *arguments = rest
        if enter is not None:
            enter(metadata)
        self._run(x, y, z, stream, function, packed, metadata, *rest)
        if self._gpu.launches is not None:
            self._gpu.launches.append(StubLaunch(self.name, self.made_of, (x, y, z), stream, tuple(arguments)))
        if leave is not None:
            leave(metadata)


@contextmanager
def stub_gpu() -> Iterator[StubGPU]:
    """Inside, tensors on the CPU are on such a GPU, and no other one is there. Kernels may not be interpreted."""
    gpu = StubGPU()

    def compile_nothing(source: Any, target: Any = None, options: dict[str, Any] | None = None, **_: Any) -> StubKernel:
        gpu.compiled += 1
        return StubKernel(gpu, source, options or {})

    answers = {
        "target_of": functools.lru_cache(lambda device: Target.SM90),
        "compute_units": functools.lru_cache(lambda device: 132),
        "device_name": functools.lru_cache(lambda device: PRODUCT),
        "can_plan": lambda call: True,
    }
    changed = []

    def change(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "epfuse"]:
        for name, answer in answers.items():
            if hasattr(module, name):
                change(module, name, answer)
    change(triton.compiler, "compile", compile_nothing)
    config = triton.runtime.driver
    before = config._active  # the property would look for a GPU
    config.set_active(gpu)
    try:
        yield gpu
    finally:
        config._active = before
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
