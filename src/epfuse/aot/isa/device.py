"""A GPU that is not there: Triton compiles and launches for it as ever, and its machine code runs under the ISA model.

Inside `executing` tensors on the CPU are taken for the target's. Triton's own launcher specialises the arguments,
compiles, and hands the launch to the driver below, which lays out the kernel's arguments as the code object's metadata
says, places the tensors' bytes in the model's memory and runs every workgroup.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from epfuse.aot.amdgcn import LDS
from epfuse.aot.isa.definedness import Definedness
from epfuse.aot.isa.program import Program, parse
from epfuse.aot.isa.recorded import Launched, Recorded, regions_of
from epfuse.aot.launches import NoDevice, driving
from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError
from epfuse.stages.extent import Extent
from epfuse.target import Target, planning_for

MOST_THREADS = 1024
"""Of a workgroup."""


@dataclass
class Session:
    """What runs inside one `executing`.

    Attributes:
        seed: of the order in which waves and workgroups advance.
        defined: which bytes of the host's tensors are defined.
        launches: those that ran, in their order.
    """

    seed: int
    defined: Definedness = field(default_factory=Definedness)
    launches: list[Launched] = field(default_factory=list)

    def run(self, recorded: Recorded) -> None:
        """Execute a launch, and write what it wrote to the host's tensors."""
        launched = recorded.run(seed=self.seed)
        for region in launched.after:
            region.to_host(self.defined)
        self.launches.append(launched)


@contextmanager
@checks_enums
def executing(target: Target, seed: int = 0) -> Iterator[Session]:
    """Inside, a kernel launched on CPU tensors is compiled for ``target`` and executed under the ISA model.

    What torch.empty returns inside is undefined, byte by byte, until a kernel or torch writes it.

    Args:
        target: GFX942.
        seed: of the order in which waves and workgroups advance.

    Raises:
        ConfigError: the target has no model, or Triton's interpreter is switched on.
    """
    if target is not Target.GFX942:
        raise ConfigError(f"target is {target.value}; the ISA model is of gfx942")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ConfigError("TRITON_INTERPRET is 1; compiled code is executed only where Triton's interpreter is off")
    session = Session(seed)
    driver = _Driver(target, session)
    loading = knobs.runtime.kernel_load_start_hook
    with planning_for(target, stand_in="cpu"), session.defined, driving(driver):
        loading.add(driver.loads)
        try:
            yield session
        finally:
            loading.remove(driver.loads)


@dataclass(frozen=True)
class _Loaded:
    """What Triton holds as the handle of a kernel."""

    hash: str
    program: Program


class _Driver(NoDevice):
    """What Triton asks of a GPU's driver, to run on the model."""

    def __init__(self, target: Target, session: Session) -> None:
        super().__init__(target)
        self.utils = self
        self.session = session
        self._assembly = ""
        self._hash = ""

    def get_current_device(self) -> str:
        return f"{self._target.value} under the ISA model"  # what Triton keeps its binders and kernels by

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": LDS[self._target].bytes}

    def loads(self, module: object, function: object, name: str, files: dict[str, str], hash: str) -> None:
        """Triton's hook: the kernel whose code `load_binary` is asked for next."""
        [assembly] = [file for file in files.values() if str(file).endswith(".amdgcn")]
        self._assembly, self._hash = Path(assembly).read_text(), hash

    def load_binary(self, name: str, code: bytes, shared: int, device: str) -> tuple[str, _Loaded, int, int, int]:
        """Triton's handles of a kernel: module, function, registers, spills, most threads."""
        return name, _Loaded(self._hash, parse(self._assembly)), 0, 0, MOST_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls for each launch of a kernel."""
        names, types = source.fn.arg_names, tuple(source.signature.values())
        threads, lds_bytes = metadata.num_warps * metadata.warp_size, metadata.shared

        def launcher(x: int, y: int, z: int, stream: int, loaded: _Loaded, *rest: Any) -> None:
            session = triton.runtime.driver.active.session  # a kernel is kept for longer than a session lasts
            given = (value.tensor if isinstance(value, Extent) else value for value in rest[4:])
            arguments = dict(zip(names, given, strict=True))
            tensors = [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
            regions = regions_of(tensors, session.defined)
            recorded = Recorded(loaded.program, loaded.hash, (x, y, z), threads, lds_bytes, arguments, types, regions)
            session.run(recorded)

        return launcher
