"""Launch a program on a memory."""

from __future__ import annotations

from epfuse.aot.isa.counts import Counts
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.program import Program


def launch(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    kernarg: bytes,
    memory: Memory,
    seed: int,
    *,
    lds_bytes: int,
) -> Counts:
    """Execute a kernel.

    Args:
        program: the kernel.
        grid: workgroups in x, y, z.
        threads: of a workgroup; a multiple of 64.
        kernarg: the kernarg segment, ``program.kernarg_bytes`` long.
        memory: what the pointers in ``kernarg`` point into; changed in place.
        seed: of the order in which workgroups and waves run.
        lds_bytes: LDS of a workgroup: what Triton's metadata calls ``shared``.

    Returns:
        What was executed.

    Raises:
        IsaError: the program holds something unknown, misses a wait, leaves its buffers or lets undefined bits decide.
    """
    raise NotImplementedError
