"""Launch a program on a memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from epfuse.aot.isa import flow, lds, mfma, salu, vector_forms, vmem
from epfuse.aot.isa.counts import LaunchCounts
from epfuse.aot.isa.errors import ExecutionError, HazardError, IsaError, UnknownInstruction
from epfuse.aot.isa.hazards import Outstanding, Recent
from epfuse.aot.isa.memory import Memory
from epfuse.aot.isa.operands import unknown
from epfuse.aot.isa.program import Instruction, Label, Program
from epfuse.aot.isa.registers import EXEC, LANES, names_of
from epfuse.aot.isa.wave import Files, Step, Wave
from epfuse.aot.isa.workgroup import Workgroup

MODE = {
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "dx10_clamp": 1,
    "ieee_mode": 1,
    "fp16_overflow": 0,
    "tg_split": 0,
    "user_sgpr_dispatch_ptr": 0,
    "user_sgpr_queue_ptr": 0,
    "user_sgpr_kernarg_segment_ptr": 1,
    "user_sgpr_dispatch_id": 0,
    "user_sgpr_kernarg_preload_offset": 0,
    "user_sgpr_private_segment_size": 0,
    "enable_private_segment": 0,
    "private_segment_fixed_size": 0,
    "system_sgpr_workgroup_id_x": 1,
    "system_sgpr_workgroup_info": 0,
    "system_vgpr_workitem_id": 0,
    "uses_dynamic_stack": 0,
}
"""What a wave starts with and computes by; another mode is refused."""
Tallies = tuple[list[int], list[int]]
"""How often each instruction was executed with an active lane, and without."""
MOST_STEPS = 2_000_000
"""Instructions of one wave, after which it is taken not to end."""


def decode(program: Program) -> list[Step]:
    """All instructions as steps.

    Raises:
        UnknownInstruction: one is not known.
    """
    return [flow.decode(each.opcode, each, program.labels) or _decode(each) for each in program.instructions]


@lru_cache(maxsize=1 << 13)
def _decode(instruction: Instruction) -> Step:
    """A step that does the same in any program."""
    name, suffix = vector_forms.bare(instruction.opcode)
    step: Step | None = None
    if not suffix:
        step = (
            salu.decode(name, instruction)
            or mfma.decode(name, instruction)
            or lds.decode(name, instruction)
            or vmem.decode(name, instruction)
        )
    step = step or vector_forms.decode(name, suffix, instruction)
    if step is None:
        raise unknown(instruction, f"the opcode {instruction.opcode} is not known")
    if step.kind in ("valu", "mfma") and step.writes & 3 << EXEC:
        raise unknown(instruction, "a vector instruction that writes exec is not known")
    return step


def launch(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    kernarg: bytes,
    memory: Memory,
    seed: int,
    *,
    lds_bytes: int,
    most_steps: int = MOST_STEPS,
    watch: Callable[[LaunchCounts], None] | None = None,
) -> LaunchCounts:
    """Execute a kernel.

    A kernel whose arguments can be preloaded into scalar registers begins, for odd seeds, where they are.

    Args:
        program: the kernel.
        grid: workgroups in x, y, z.
        threads: of a workgroup; a multiple of 64.
        kernarg: the kernarg segment, ``program.kernarg_bytes`` long.
        memory: what the pointers in ``kernarg`` point into; changed in place.
        seed: of the order in which workgroups and waves run.
        lds_bytes: LDS of a workgroup: what Triton's metadata calls ``shared``.
        most_steps: of a wave, after which it is taken not to end.
        watch: called after each workgroup; what it raises ends the launch.

    Returns:
        What was executed.

    Raises:
        IsaError: the program holds something unknown, misses a wait, leaves its buffers or lets undefined bits decide.
    """
    _check_launch(program, threads, kernarg)
    steps = decode(program)
    counts = LaunchCounts()
    tally, idle = [0] * len(steps), [0] * len(steps)
    pointer = memory.place(np.frombuffer(kernarg, np.uint8), "kernarg", align=64)
    grain = min([4, *(step.facts["bytes"] for step in steps if "bytes" in step.facts)])
    memory.begin(grain)
    order = random.Random(seed)
    groups = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    numbers = {group: number for number, group in enumerate(groups)}
    order.shuffle(groups)
    files = [Files() for _ in range(threads // LANES)]
    with np.errstate(all="ignore"):
        for group in groups:
            shared = Workgroup(numbers[group], lds_bytes + program.lds_bytes, memory, counts, grain)
            waves = [
                _wave(program, number, group, shared, pointer, kernarg, seed, file) for number, file in enumerate(files)
            ]
            _run_group(waves, steps, (tally, idle), order, most_steps)
            for wave in waves:
                counts.waits.update(wave.waits.waited)
            if watch is not None:
                watch(counts)
    for place, step in enumerate(steps):
        if tally[place] + idle[place]:
            counts.instructions[step.name] += tally[place] + idle[place]
        if tally[place] or (idle[place] and step.kind in ("salu", "smem", "flow")):
            counts.reached.add(place)
    return counts


def _check_launch(program: Program, threads: int, kernarg: bytes) -> None:
    if threads % LANES or not 0 < threads <= program.threads:
        raise ExecutionError(f"threads is {threads}; it must be a multiple of {LANES} up to {program.threads}")
    if len(kernarg) != program.kernarg_bytes:
        raise ExecutionError(f"kernarg has {len(kernarg)} bytes; {program.name} takes {program.kernarg_bytes}")
    for name, value in MODE.items():
        if program.directives.get(name) != value:
            raise UnknownInstruction(f".amdhsa_{name} is {program.directives.get(name)}; only {value} is known")


def _wave(
    program: Program,
    number: int,
    group: tuple[int, int, int],
    shared: Workgroup,
    pointer: int,
    kernarg: bytes,
    seed: int,
    files: Files,
) -> Wave:
    """A wave as the hardware starts it."""
    wave = Wave(number, shared, Outstanding(), Recent(), files)
    wave.set_pair(0, pointer)
    wave.define_scalar(0, 2)
    first = program.directives["user_sgpr_count"]
    for axis, place in zip("xyz", group, strict=True):
        if program.directives[f"system_sgpr_workgroup_id_{axis}"]:
            wave.scalars[first] = place
            wave.define_scalar(first)
            first += 1
        elif place:
            raise ExecutionError(f"the grid has workgroups along {axis}, of which {program.name} knows nothing")
    wave.rows[0][...] = np.arange(LANES * number, LANES * (number + 1))
    wave.shade(0, 0)
    preloaded = program.directives["user_sgpr_kernarg_preload_length"]
    if preloaded and seed % 2:
        entry = program.instructions
        branch = next(place for place, each in enumerate(entry) if each.opcode == "s_branch")
        [label] = entry[branch].operands
        assert isinstance(label, Label)
        wave.place = program.labels[label.name]
        words = np.frombuffer(kernarg[: 4 * preloaded], np.uint32).tolist()
        wave.scalars[2 : 2 + len(words)] = words
        wave.define_scalar(2, len(words))
    return wave


def _run_group(waves: list[Wave], steps: list[Step], tallies: Tallies, order: random.Random, most_steps: int) -> None:
    """Run every wave to its next barrier, in some order, until all have ended."""
    left = dict.fromkeys(waves, most_steps)
    while True:
        turn = list(waves)
        order.shuffle(turn)
        stops = {wave: run_wave(wave, steps, tallies, left) for wave in turn}
        names = {steps[place].name for place in stops.values()}
        if len(names) > 1:
            line = next(steps[place].instruction.line for place in stops.values() if steps[place].name == "s_barrier")
            raise ExecutionError("some waves of a workgroup wait at a barrier and others have ended", line)
        if names == {"s_endpgm"}:
            return
        waves[0].group.barrier()


def run_wave(wave: Wave, steps: list[Step], tallies: Tallies, left: dict[Wave, int]) -> int:
    """Run to a barrier or to the end; gives the place of that instruction."""
    waits, recent, remaining, scalars = wave.waits, wave.recent, left[wave], wave.scalars
    tally, idle = tallies
    while True:
        place = wave.place
        if place >= len(steps):
            raise ExecutionError("a wave runs past the end of the program")
        if not remaining:
            raise ExecutionError("a wave does not end", steps[place].instruction.line)
        remaining -= 1
        step = steps[place]
        if scalars[EXEC] or scalars[EXEC + 1]:
            tally[place] += 1
        else:
            idle[place] += 1
        wave.place = place + 1
        touched = step.touched
        if touched & waits.pending:
            _refuse(wave, step, touched)
        if touched & recent.hot:
            recent.check(wave, step)
        if step.near:
            recent.check_near(wave, step)
        if touched & wave.undefined:
            step.shade(wave)
        try:
            step.run(wave)
        except IsaError as error:
            if error.line is None:
                raise type(error)(str(error), step.instruction.line) from None
            raise
        if step.noted:
            recent.note(step, wave.clock)
        wave.clock += step.states
        if step.stops:
            left[wave] = remaining
            return place


def _refuse(wave: Wave, step: Step, touched: int) -> None:
    pending = touched & wave.waits.pending
    counter, line = wave.waits.culprit(pending)
    raise HazardError(
        f"{step.instruction.text} uses {names_of(pending)}, which line {line} loads and no wait on {counter} covers",
        step.instruction.line,
    )
