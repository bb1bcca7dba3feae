"""What a call would launch: kernel, argument types, constants and options, as Triton's launcher specialises them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from epfuse.arguments import checks_enums
from epfuse.kernel_keys import settle_key
from epfuse.target import Target, planning_for

if TYPE_CHECKING:
    DriverBase = object  # Triton's has no types
else:
    from triton.backends.driver import DriverBase

TRITON_TARGETS: dict[Target, GPUTarget] = {
    Target.GFX942: GPUTarget("hip", "gfx942", 64),
    Target.GFX950: GPUTarget("hip", "gfx950", 64),
    Target.SM90: GPUTarget("cuda", 90, 32),
}

MACHINE_OPTIONS = ("extern_libs", "warp_size", "arch", "backend_name")
"""Options that the compiler fills in itself; the first one holds paths of this machine."""


@checks_enums
@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel.

    Attributes:
        target: what it is specialised for.
        module: of the kernel; ``epfuse.stages.STAGE.kernel*``.
        kernel: name in that module.
        signature: argument name -> Triton type, "constexpr" for a constant; of a tuple its items' types.
        constants: argument name -> value.
        attributes: argument name -> what is known of it (divisibility, 32-bit range); of some nothing is, which counts
            in Triton's key.
        options: compiler options.
    """

    target: Target
    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def stage(self) -> str:
        """The package of ``epfuse.stages`` that the kernel is in."""
        return self.module.split(".")[2]

    def function(self) -> Any:
        """The kernel itself."""
        return getattr(importlib.import_module(self.module), self.kernel)

    def compile(self) -> Any:
        """Compile; Triton's cache, keyed by source, constants, options and Triton's version, answers if it can."""
        function = self.function()
        settle_key(function)
        place = {name: (index,) for index, name in enumerate(function.arg_names)}
        source = _source_kind(function)(
            fn=function,
            signature=dict(self.signature),
            constexprs={place[name]: value for name, value in self.constants},
            attrs={place[name]: [list(pair) for pair in pairs] for name, pairs in self.attributes},
        )
        return triton.compile(source, target=TRITON_TARGETS[self.target], options=dict(self.options))


def _source_kind(function: Any) -> Any:
    """Triton's class of sources that ``function`` is compiled as."""
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


class NoDevice(DriverBase):
    """A driver that knows its target and has nothing to run on."""

    @checks_enums
    def __init__(self, target: Target) -> None:
        super().__init__()
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return TRITON_TARGETS[self._target]

    def get_current_device(self) -> str:
        return self._target.value  # what Triton keeps its binders by

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def launches_of(
    target: Target, call: Callable[[], None], product: str | None = None, stand_in: str = "meta"
) -> list[Launch]:
    """Run ``call`` on the meta device and note every kernel that it would launch; nothing is compiled or launched.

    Triton asks its ``jit_cache_hook`` before it compiles, and takes a true answer for "don't".

    Args:
        target: a GPU.
        call: makes tensors on the device that stands for it, and calls.
        product: as `planning_for` takes it.
        stand_in: as `planning_for` takes it.
    """
    found: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        options = json.loads(compile["specialization_data"])["options"]
        found.append(
            Launch(
                target=target,
                module=fn.module,
                kernel=fn.jit_function.__name__,
                signature=tuple(compile["signature"].items()),
                constants=tuple((names[place], value) for (place,), value in compile["constants"].items()),
                attributes=tuple(
                    (names[place], tuple((name, value) for name, value in pairs))
                    for (place,), pairs in compile["configs"][0].items()
                ),
                options=tuple((name, _frozen(value)) for name, value in options.items() if name not in MACHINE_OPTIONS),
            )
        )
        return True

    with planning_for(target, product, stand_in), _asking(note), driving(NoDevice(target)):
        call()
    return found


@contextmanager
def driving(driver: DriverBase) -> Any:
    """Have Triton use ``driver``; afterwards the one before, which in a server runs kernels."""
    config = triton.runtime.driver
    before = config._active  # the property would look for a GPU
    config.set_active(driver)
    try:
        yield
    finally:
        config._active = before


@contextmanager
def _asking(hook: Callable[..., bool]) -> Any:
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def _frozen(value: Any) -> Any:
    """Lists, which JSON makes of tuples, back to tuples: hashable, and the options' own type."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
