"""A record as tables, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console

from epfuse.aot import amdgcn, sass
from epfuse.aot.kernels import Kernel
from epfuse.aot.predict import published
from epfuse.aot.record import AotRecord, TargetRecord
from epfuse.hardware.h100 import FITTED_TOKENS, H100, h100
from epfuse.hardware.published import BF16_POINTS
from epfuse.hardware.time_model import MI300X, MI300X_ROUTING, mean_error
from epfuse.report.terminal import print_rows
from epfuse.verify.record import versions


@dataclass(frozen=True)
class TextTable:
    """A title, names of the columns, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(record: AotRecord) -> list[TextTable]:
    """Every table of a record."""
    found = []
    for target in record.targets:
        gemms = [kernel for kernel in target.kernels if kernel.tile is not None]
        others = [kernel for kernel in target.kernels if kernel.tile is None]
        columns = AMD_COLUMNS if target.target.is_amd else NVIDIA_COLUMNS
        if gemms:
            found.append(_kernels(f"{target.target.value}: grouped GEMMs (compiled)", columns, gemms))
        if others:
            plain = columns[: columns.index(FIRST_LOOP_COLUMN)]
            found.append(_kernels(f"{target.target.value}: other kernels (compiled)", plain, others))
        if target.compared:
            found.append(_beside(target))
        found.append(_gates(target))
    if record.predictions:
        found += [_published(), _predictions(record), _h100()]
    return found


def show(tables: Iterable[TextTable], console: Console) -> None:
    """Print tables."""
    for table in tables:
        print_rows(console, table.title, table.columns, table.rows)


def markdown(tables: Iterable[TextTable], command: str) -> str:
    """Tables as Markdown, and what made them; ``command`` is what was typed."""
    found = versions()
    date = datetime.now(UTC).date().isoformat()
    parts = [f"Made by `{command}` on {date}, epfuse {found['epfuse']}, triton {found['triton']}."]
    for table in tables:
        lines = [f"**{table.title}**", "", _line(table.columns), _line(["---"] * len(table.columns))]
        parts.append("\n".join(lines + [_line(row) for row in table.rows]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


Column = tuple[str, Callable[[Kernel], str]]


def _amd(kernel: Kernel) -> amdgcn.Resources:
    assert isinstance(kernel.resources, amdgcn.Resources)
    return kernel.resources


def _amd_seen(kernel: Kernel) -> amdgcn.Occupancy:
    assert isinstance(kernel.occupancy, amdgcn.Occupancy)
    return kernel.occupancy


def _nvidia(kernel: Kernel) -> sass.Resources:
    assert isinstance(kernel.resources, sass.Resources)
    return kernel.resources


def _path(kernel: Kernel) -> str:
    paths = "+".join(kernel.use.paths)
    return f"{paths} ({', '.join(kernel.variant)})" if kernel.variant else paths


def _tokens(kernel: Kernel) -> str:
    first, last = kernel.use.tokens
    return str(first) if first == last else f"{first}..{last}"


def _widths(kernel: Kernel) -> str:
    assert kernel.loop is not None
    return " ".join(f"{count}x{width}B" for width, count in sorted(kernel.loop.load_widths.items(), reverse=True))


def _matrix(kernel: Kernel) -> str:
    if kernel.loop is None:
        return "none"
    return " ".join(
        f"{count} {name.removeprefix('v_mfma_').removesuffix('.F32.BF16')}"
        for name, count in kernel.loop.matrix.items()
    )


def _mca(kernel: Kernel) -> str:
    if kernel.mca is None:
        return ""
    return f"{kernel.mca.get('vector', 0):.0f}/{kernel.mca.get('matrix', 0):.0f}"


def _in_loop(text: Callable[[Kernel], str]) -> Callable[[Kernel], str]:
    return lambda kernel: "" if kernel.loop is None else text(kernel)


COMMON: tuple[Column, ...] = (
    ("stage", lambda kernel: kernel.launch.stage),
    ("path", _path),
    ("tile", lambda kernel: kernel.settings),
    ("T", _tokens),
)
LOOP: tuple[Column, ...] = (
    ("matrix a turn", _matrix),
    ("loads a turn", _in_loop(_widths)),
    ("waits", _in_loop(lambda kernel: str(kernel.loop.waits if kernel.loop else 0))),
)
AMD_COLUMNS: tuple[Column, ...] = (
    *COMMON,
    ("VGPR+AGPR", lambda kernel: f"{_amd(kernel).vgprs}+{_amd(kernel).agprs}"),
    ("SGPR", lambda kernel: str(_amd(kernel).sgprs)),
    ("spills", lambda kernel: str(_amd(kernel).vgpr_spills + _amd(kernel).sgpr_spills)),
    ("scratch", lambda kernel: str(_amd(kernel).scratch_bytes)),
    ("LDS", lambda kernel: str(_amd(kernel).lds_bytes)),
    ("WG/CU", lambda kernel: str(_amd_seen(kernel).workgroups_per_cu)),
    ("waves/SIMD", lambda kernel: f"{_amd_seen(kernel).waves_per_simd:g}"),
    ("limit", lambda kernel: "+".join(_amd_seen(kernel).limits)),
    *LOOP,
    ("vector", _in_loop(lambda kernel: str(kernel.loop.vector if kernel.loop else 0))),
    ("mca V/M", _mca),
)
NVIDIA_COLUMNS: tuple[Column, ...] = (
    *COMMON,
    ("registers", lambda kernel: str(_nvidia(kernel).registers)),
    ("stack", lambda kernel: str(_nvidia(kernel).stack_bytes)),
    ("shared", lambda kernel: str(_nvidia(kernel).shared_bytes)),
    ("blocks/SM", lambda kernel: str(kernel.occupancy.blocks_per_sm)),  # type: ignore[union-attr]
    ("limit", lambda kernel: "+".join(kernel.occupancy.limits)),
    *LOOP,
    ("TMA", _in_loop(lambda kernel: str(kernel.loop.bulk_copies if kernel.loop else 0))),
)
FIRST_LOOP_COLUMN = LOOP[0]


def _kernels(title: str, columns: Sequence[Column], kernels: Sequence[Kernel]) -> TextTable:
    """A row a kernel; a column that is empty throughout (no llvm-mca) is left out."""
    rows = [[text(kernel) for _, text in columns] for kernel in kernels]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return TextTable(title, [columns[index][0] for index in used], [[row[index] for index in used] for row in rows])


def _beside(target: TargetRecord) -> TextTable:
    """Pull request 1782's GEMM1 and the tile that this package takes in its place."""
    theirs = target.compared[0]
    ours = [
        kernel
        for kernel in target.kernels
        if kernel.launch.stage == theirs.launch.stage.replace("seed", "gate_up")
        and set(theirs.use.paths) <= set(kernel.use.paths)
        and set(theirs.use.shapes) <= set(kernel.use.shapes)
        and "bf16" in kernel.use.dtypes
        and kernel.use.tokens[0] <= theirs.use.tokens[0] <= kernel.use.tokens[1]
    ]
    title = (
        f"{target.target.value}: GEMM1 at T={theirs.use.tokens[0]}, two weight tiles (seed) beside one that alternates"
    )
    return _kernels(title, AMD_COLUMNS, [theirs, *ours])


def _gates(target: TargetRecord) -> TextTable:
    rows = [[gate.name, "pass" if gate.ok else "FAIL", gate.detail] for gate in target.gates]
    return TextTable(f"{target.target.value}: gates", ("gate", "result", "detail"), rows)


def _published() -> TextTable:
    rows = [
        [
            comparison.measurement.name,
            comparison.measurement.kernels.name,
            f"{comparison.measurement.milliseconds:.2f}",
            f"{comparison.predicted_ms:.2f}",
            f"{comparison.error:+.0%}",
        ]
        for comparison in published()
    ]
    title = (
        f"{MI300X.name}: expert GEMMs of a decode step, measured by others and the model of it"
        f" (eta {MI300X.eta}, {1e6 * MI300X.launch_seconds:.0f} us a launch, routing skew {MI300X_ROUTING.skew})"
    )
    return TextTable(title, ("point", "kernels", "measured ms", "model ms", "error"), rows)


def _h100() -> TextTable:
    comparisons = h100()
    fitted = [c for c in comparisons if c.measurement.tokens <= FITTED_TOKENS]
    rows = [
        [
            comparison.measurement.kernels.name,
            comparison.measurement.name,
            f"{1e3 * comparison.measurement.milliseconds:.0f}",
            f"{1e3 * comparison.predicted_ms:.0f}",
            f"{comparison.error:+.0%}",
        ]
        for comparison in comparisons
    ]
    title = (
        f"{H100.name}: expert GEMMs of one layer, measured by us and the model of it (eta {H100.eta},"
        f" {1e6 * H100.launch_seconds:.1f} us a launch; mean error {mean_error(fitted):.1%} up to {FITTED_TOKENS}"
        f" tokens, which were fitted, {mean_error(comparisons):.1%} over all)"
    )
    return TextTable(title, ("path", "point", "measured us", "model us", "error"), rows)


def _predictions(record: AotRecord) -> TextTable:
    names = [point.name for point in BF16_POINTS]
    rows = [
        [
            prediction.kernels.name,
            *(f"{prediction.milliseconds[name]:.2f} ({prediction.bound[name]})" for name in names),
        ]
        for prediction in record.predictions
    ]
    title = f"{MI300X.name}: expert GEMMs of a decode step, PREDICTED, ms (and what GEMM1 waits for)"
    return TextTable(title, ("path", *names), rows)
