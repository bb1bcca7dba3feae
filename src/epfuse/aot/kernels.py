"""One compiled kernel: where it comes from, what it takes, what its instructions are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epfuse.aot import amdgcn, sass
from epfuse.aot.assembly import InstructionCounts
from epfuse.aot.calls import Call
from epfuse.aot.launches import Launch
from epfuse.config import SwiGLUOAI
from epfuse.report.write import write_atomic
from epfuse.weights.panels import PANEL_ROWS

ROWS = ("x", "y")
WEIGHTS = ("w13", "w2")
BIASES = ("bias", "up_bias")
"""Names of the GEMM kernels' arguments."""
ITEM_BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*fp8e4nv": 1, "*fp8e4b8": 1, "*u8": 1}


@dataclass(frozen=True)
class KernelUse:
    """The calls that launch a kernel.

    Attributes:
        paths, dtypes, shapes: names.
        tokens: the fewest and the most tokens among the calls that were tried.
    """

    paths: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]
    tokens: tuple[int, int]

    @classmethod
    def of(cls, calls: Iterable[Call]) -> KernelUse:
        calls = list(calls)
        return cls(
            paths=tuple(dict.fromkeys(call.path.value for call in calls)),
            dtypes=tuple(dict.fromkeys(call.dtype for call in calls)),
            shapes=tuple(dict.fromkeys(call.shape for call in calls)),
            tokens=(min(call.tokens for call in calls), max(call.tokens for call in calls)),
        )


@dataclass(frozen=True)
class Tile:
    """A GEMM kernel's tile."""

    block_m: int
    block_n: int
    block_k: int

    @property
    def macs(self) -> int:
        """Multiply-adds of one K step."""
        return self.block_m * self.block_n * self.block_k


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        launch: what was compiled.
        use: the calls that launch it.
        resources: registers, memory, spills.
        occupancy: workgroups (AMD) or blocks (NVIDIA) that fit a compute unit.
        counts: instructions of the whole kernel.
        loop: instructions of one turn of the main loop; None where there are no matrix instructions.
        mca: what llvm-mca says of the main loop, clocks by resource; None without llvm-mca.
    """

    launch: Launch
    use: KernelUse
    resources: amdgcn.Resources | sass.Resources
    occupancy: amdgcn.Occupancy | sass.Occupancy
    counts: InstructionCounts
    loop: InstructionCounts | None
    mca: dict[str, float] | None = None

    @property
    def tile(self) -> Tile | None:
        """The tile of a GEMM; None for the other stages."""
        constants = dict(self.launch.constants)
        if "CONSUMERS" in constants:
            constants.setdefault("BLOCK_N", constants["CONSUMERS"] * PANEL_ROWS)
        sizes = [constants.get(f"BLOCK_{letter}") for letter in "MNK"]
        return None if None in sizes else Tile(*sizes)  # type: ignore[arg-type]

    @property
    def row_type(self) -> str | None:
        """Triton's type of the rows, None for a stage without any."""
        return self._type(ROWS)

    @property
    def weight_type(self) -> str | None:
        """Triton's type of the weights, None for a stage without any."""
        return self._type(WEIGHTS)

    def _type(self, names: tuple[str, ...]) -> str | None:
        signature = dict(self.launch.signature)
        return next((signature[name] for name in names if name in signature), None)

    @property
    def lanes(self) -> int:
        """Lanes of a workgroup."""
        return self._warps * (amdgcn.LANES if self.is_amd else 32)

    @property
    def is_amd(self) -> bool:
        return self.launch.target.is_amd

    @property
    def name(self) -> str:
        """Stage, path, tile: what a failed gate calls the kernel by."""
        parts = [self.launch.stage, "+".join(self.use.paths), *self.variant, self.settings]
        return " ".join(parts)

    @property
    def variant(self) -> list[str]:
        """What sets the kernel apart from others in its tile: other weights, rows or activation, biases, atomics."""
        weights = [] if self.weight_type in (None, "*bf16") else [str(self.weight_type).removeprefix("*")]
        rows = [] if "bf16" in self.use.dtypes or weights else ["/".join(self.use.dtypes)]
        kind = dict(self.launch.constants).get("ACTIVATION", SwiGLUOAI.kind)
        other = ([] if kind == SwiGLUOAI.kind else [kind]) + (["biases"] if self._type(BIASES) == "*fp32" else [])
        return [*weights, *rows, *other, *(["atomic"] if self.counts.atomics else [])]

    @property
    def settings(self) -> str:
        """The tile, or the constants of a stage that has none, and the warps."""
        options, constants = dict(self.launch.options), dict(self.launch.constants)
        tile = self.tile
        if tile is None:
            shown = [f"{name}={value}" for name, value in constants.items() if type(value) is int]
        else:
            shown = [f"{tile.block_m}x{tile.block_n}x{tile.block_k}"]
            if constants.get("EVEN_K") is False:
                shown.append("masked")
        return " ".join([*shown, f"{options['num_warps']}w", f"{self.stages}s"])

    @property
    def stages(self) -> int:
        """Stages of the software pipeline."""
        stages = dict(self.launch.constants).get("STAGES", dict(self.launch.options)["num_stages"])
        return int(stages)

    @property
    def is_specialised(self) -> bool:
        """Whether one partition of the warps copies what the others multiply, in a loop of its own."""
        return not self.is_amd and self._warps != dict(self.launch.options)["num_warps"]

    @property
    def _warps(self) -> int:
        r = self.resources
        return r.waves if isinstance(r, amdgcn.Resources) else r.warps

    def steps_by_matrix(self) -> float:
        """K steps in one turn of the main loop, by its multiply-adds."""
        assert self.loop is not None
        assert self.tile is not None
        # num_warps is then the size of one partition, the copying one too
        multiplying = self._warps - (dict(self.launch.options)["num_warps"] if self.is_specialised else 0)
        return self.loop.matrix_macs * (multiplying // self.loop.matrix_warps) / self.tile.macs

    def steps_by_loads(self, width: int = 16) -> float:
        """K steps in one turn of the main loop, by its loads of at least ``width`` bytes against the weights' bytes."""
        assert self.loop is not None
        assert self.tile is not None
        if self.weight_type not in ITEM_BYTES:
            raise ValueError(
                f"{self.launch.kernel} has weights of type {self.weight_type}; one of {WEIGHTS} must be in it"
            )
        loaded = sum(size * count for size, count in self.loop.load_widths.items() if size >= width) * self.lanes
        return loaded / (self.tile.block_n * self.tile.block_k * ITEM_BYTES[self.weight_type])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        options = dict(self.launch.options)
        constants = {name: value for name, value in self.launch.constants if type(value) in (int, bool)}
        return {
            "stage": self.launch.stage,
            "path": "+".join(self.use.paths),
            "kernel": self.launch.kernel,
            "tile": self.settings,
            "weights": (self.weight_type or "").removeprefix("*") or None,
            "dtypes": list(self.use.dtypes),
            "shapes": list(self.use.shapes),
            "tokens": list(self.use.tokens),
            "constants": constants,
            "num_warps": options["num_warps"],
            "num_stages": self.stages,
            **asdict(self.resources),
            **asdict(self.occupancy),
            **self.counts.to_json(),
            "loop": None if self.loop is None else self.loop.to_json(),
            "mca": self.mca,
        }


def build(launch: Launch, use: KernelUse, folder: Path | None = None, mca: str | None = None) -> Kernel:
    """Compile one kernel and read what came out.

    Args:
        launch: the kernel's specialisation.
        use: who launches it.
        folder: where to write the assembly; None doesn't.
        mca: path of llvm-mca; None leaves it out.
    """
    compiled = launch.compile()
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    resources: amdgcn.Resources | sass.Resources
    seen: amdgcn.Occupancy | sass.Occupancy
    if launch.target.is_amd:
        text, dialect = compiled.asm["amdgcn"], amdgcn.AMDGCN
        resources = amdgcn.resources_of(text, shared, warps)
        seen = amdgcn.occupancy(resources, launch.target)
    else:
        resources, text = sass.disassemble(compiled.asm["cubin"], shared, warps)
        seen, dialect = sass.occupancy(resources), sass.SASS
    lines = text.splitlines()
    counts, body = dialect.counts(lines), dialect.main_loop(lines)
    clocks = None
    if mca is not None and body and launch.target.is_amd:
        from epfuse.aot.mca import clocks_of

        clocks = clocks_of(mca, launch.target, body)
    kernel = Kernel(launch, use, resources, seen, counts, dialect.counts(body) if body else None, clocks)
    if folder is not None:
        name = re.sub(r"[ +/=]", "-", kernel.name)
        write_atomic(folder / f"{launch.target.value}.{name}.{compiled.hash[:8]}.s", text)
    return kernel
