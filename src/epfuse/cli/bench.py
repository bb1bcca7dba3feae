"""``epfuse bench``."""

from __future__ import annotations

import contextlib
import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.names import comma_names, layer_sizes, token_count

if TYPE_CHECKING:
    from epfuse.bench.compare import RecordComparison
    from epfuse.bench.record import BenchRecord
    from epfuse.bench.run import BenchPlan

SHAPE_NAMES = [
    "minimax-m3-ep8", "minimax-m3-ep4", "minimax-m3-ep16", "minimax-m3-tp8",
    "gpt-oss-120b", "gpt-oss-20b", "gpt-oss-120b-biases", "gpt-oss-20b-biases", "qwen3-235b", "small", "custom",
]  # fmt: skip
PEER_NAMES = ("vllm", "transformers", "torch", "deepgemm", "flashinfer")
PATH_NAMES = ("auto", "all", "reference", "bf16", "w8a16", "w8a8", "block_fp8")
GPU_TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 8192)
CPU_TOKENS = (1, 16, 64, 256)
QUICK_TOKENS: dict[str, tuple[int, ...]] = {"cuda": (1, 64, 1024), "cpu": (1, 64)}
FILE_WIDTH = 110
"""Columns of the tables where no terminal says how many it has."""

EPILOG = """\b
Examples:
  epfuse bench
  epfuse bench --shape minimax-m3-ep8 --routing uniform,zipf:1.2 --json h100.json --html h100.html
  epfuse bench --paths w8a16 --peers none --tokens 256 --compare h100.json --fail-on-slower
  epfuse bench --shape custom --hidden 4096 --intermediate 1536 --experts 128 --top-k 8 --activation silu
  epfuse bench --quick --device cpu
  torchrun --nproc-per-node 2 -m epfuse bench --distributed --json ep2.json

\b
Exit status: 0 good; 1 a result was wrong, a path failed, or with --fail-on-slower a path became slower; 2 usage, or
an output that could not be written.
"""


def _counts(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """Token counts: the option several times, or commas, or both."""
    return tuple(dict.fromkeys(token_count(text) for text in ",".join(values).split(","))) if values else ()


@click.command(epilog=EPILOG)
@click.option(
    "--shape", type=click.Choice(SHAPE_NAMES), help="The layer.  [default: minimax-m3-ep8 on a GPU, small on a CPU]"
)
@layer_sizes("Expert-parallel ranks, of which the first is measured.")
@click.option("--activation", type=click.Choice(["swiglu-oai", "silu"]), help="Between the two projections.")
@click.option(
    "--tokens",
    multiple=True,
    callback=_counts,
    metavar="T,..",
    help=f"Token counts.  [default: {','.join(map(str, GPU_TOKENS))} on a GPU]",
)
@click.option(
    "--paths",
    callback=comma_names(PATH_NAMES),
    metavar="NAME,..",
    help=f"Some of {', '.join(PATH_NAMES)}. auto: what the policy chooses; all: every weight format and way to sum,"
    " too.  [default: each path that has kernels, on its best weights]",
)
@click.option(
    "--routing",
    default="uniform",
    show_default=True,
    metavar="NAME,..",
    help="Some of uniform, zipf:S and all-to:N (every token to the same N experts of this rank).",
)
@click.option(
    "--peers",
    callback=comma_names((*PEER_NAMES, "none")),
    metavar="NAME,..",
    help=f"Some of {', '.join(PEER_NAMES)}, or none.  [default: all that are installed]",
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the record; - or no FILE: print it instead of the tables.",
    metavar="[FILE]",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained page.")
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the curves as SVG, and as PNG if matplotlib is installed.",
)
@click.option(
    "--compare",
    "older",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="An older record of the same layer: say what changed by more than the noise.",
)
@click.option("--fail-on-slower", is_flag=True, help="With --compare: exit with 1 if a path became slower.")
@click.option("--device", help="cpu, cuda or cuda:N (CUDA and ROCm).  [default: cuda if there is one]")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**31 - 1),
    default=0,
    show_default=True,
    help="Of weights, activations and routings.",
)
@click.option("--quick", is_flag=True, help="Few token counts and samples.")
@click.option(
    "--distributed",
    is_flag=True,
    help="Over the ranks that torchrun started: each rank's share, the sum over them, both, other exchange modes.",
)
def bench(
    shape: str | None,
    sizes: dict[str, int | None],
    activation: str | None,
    tokens: tuple[int, ...],
    paths: tuple[str, ...] | None,
    routing: str,
    peers: tuple[str, ...] | None,
    json_file: str | None,
    html: Path | None,
    pictures: Path | None,
    older: Path | None,
    fail_on_slower: bool,
    device: str | None,
    seed: int,
    quick: bool,
    distributed: bool,
) -> None:
    """Time every path of one rank's expert layer beside its floor and beside other people's kernels.

    First the device's roofs are measured: how fast it reads memory and multiplies. Then, at each token count and
    routing, every path and peer computes the same layer: into poisoned memory, compared with float64, and only if it is
    right is it timed, in CUDA graphs on a GPU, with inputs in turn that exceed the caches. A row is the whole layer,
    from (hidden, topk_weights, topk_ids, expert_map) to the sum over local routes. The floor is max(bytes of the active
    experts' weights / read rate, FLOPs of their rows / matmul rate).

    With --distributed, under torchrun, the layer runs on all ranks: it is checked in every exchange mode, and then each
    rank's share, the all_reduce alone and both together are timed, on GPUs in graphs that hold the collectives too.
    """
    if fail_on_slower and older is None:
        raise click.UsageError("--fail-on-slower needs --compare")
    if peers is not None and "none" in peers and len(peers) > 1:
        raise click.BadParameter("none excludes all others", param_hint="--peers")
    if distributed:
        from epfuse.cli.bench_distributed import bench_distributed

        for option, given in (
            ("--device", device), ("--ep-size", sizes["ep_size"]), ("--peers", peers), ("--html", html),
            ("--pictures", pictures), ("--compare", older),
        ):  # fmt: skip
            if given is not None:
                raise click.UsageError(f"{option} does not go with --distributed")
        bench_distributed(shape, sizes, activation, tokens, paths, routing, json_file, seed, quick)
    kept = None if json_file in (None, "-") else Path(str(json_file))
    delivery = Delivery({"--json": kept, "--html": html}, folders={"--pictures": pictures})
    from epfuse.bench.compare import check_comparable, compare_records
    from epfuse.bench.inputs import least_bytes
    from epfuse.bench.layers import make_layer
    from epfuse.bench.measure import QUICK, THOROUGH
    from epfuse.bench.read_record import read_record
    from epfuse.bench.routing import Routing
    from epfuse.bench.run import BenchPlan
    from epfuse.cli.device import check_memory, choose_device

    if html is not None or pictures is not None:
        import epfuse.report.page  # noqa: F401  (refuses now, not after the run, if jinja2 is missing)
    where = choose_device(device)
    layer = make_layer(shape or ("small" if where.type == "cpu" else "minimax-m3-ep8"), sizes, activation)
    default = QUICK_TOKENS[where.type] if quick else CPU_TOKENS if where.type == "cpu" else GPU_TOKENS
    plan = BenchPlan(
        layer=layer,
        tokens=tokens or default,
        routings=tuple(dict.fromkeys(Routing.parse(text) for text in routing.split(","))),
        device=where,
        seed=seed,
        sampling=QUICK if quick else THOROUGH,
    )
    for one in plan.routings:
        one.check(layer.shape)
    before = read_record(older) if older else None
    if before is not None:
        check_comparable(before.layer, layer)
    chosen_peers = PEER_NAMES if peers is None else () if "none" in peers else peers
    check_memory(least_bytes(layer, plan.tokens), where, f"{layer.name} and {max(plan.tokens)} tokens")
    record = _run(plan, paths or (), chosen_peers, kept)
    comparison = None if before is None else compare_records(before, record)
    _report(delivery, record, comparison, kept, html, pictures, print_json=json_file == "-")
    slower = fail_on_slower and comparison is not None and bool(comparison.slower)
    delivery.exit(passed=record.ok and not slower)


def _run(plan: BenchPlan, paths: tuple[str, ...], peers: tuple[str, ...], kept: Path | None) -> BenchRecord:
    """Measure, with a bar on stderr. A record file is written after each point: a run that is cut off leaves one."""
    from epfuse.bench import machine
    from epfuse.bench.contender import ContenderKind, paths_of, problem_of
    from epfuse.bench.peers.find import find_peers
    from epfuse.bench.record import BenchRecord, to_text
    from epfuse.bench.roofs import measure_roofs
    from epfuse.bench.run import run_points
    from epfuse.bench.weights import LayerWeights
    from epfuse.report.terminal import bars
    from epfuse.report.write import write_atomic
    from epfuse.target import on_device

    device = plan.device
    problem = problem_of(plan.layer, plan.tokens, device, plan.seed)
    clocks = {"at the start": machine.read_clocks(device)}
    with bars() as progress, on_device(device):
        task = progress.add_task("looking for paths", total=None)
        weights = LayerWeights(plan.layer, plan.seed, device, lambda what: progress.update(task, description=what))
        contenders = paths_of(problem, paths, weights)
        progress.update(task, description="measuring the roofs")
        roofs = measure_roofs(device, plan.sampling)
        clocks["after the roofs"] = machine.read_clocks(device)
        found, absent = find_peers(peers, weights, lambda name: progress.update(task, description=f"loading {name}"))
        contenders += found
        record = BenchRecord(
            layer=plan.layer,
            device=machine.describe_device(device),
            roofs=roofs,
            absent=absent,
            notes={contender.name: contender.note for contender in contenders if contender.kind is ContenderKind.PEER},
            run=machine.run_facts(["epfuse"], seed=plan.seed, clocks=clocks),
            complete=False,
        )
        progress.update(task, total=len(plan.points) * len(contenders), completed=0)
        first = True

        def advance(what: str) -> None:
            nonlocal first
            progress.update(task, description=what, advance=0 if first else 1)
            first = False

        for rows in run_points(plan, weights, contenders, roofs, advance):
            record.rows.extend(rows)
            if kept is not None:
                with contextlib.suppress(OSError):  # the measurement goes on; the last write, of all, counts
                    write_atomic(kept, to_text(record))
    clocks["at the end"] = machine.read_clocks(device)
    return replace(record, complete=True)


def _report(
    delivery: Delivery,
    record: BenchRecord,
    comparison: RecordComparison | None,
    kept: Path | None,
    html: Path | None,
    pictures: Path | None,
    print_json: bool,
) -> None:
    """The record's file; results to stdout: the record if it was asked for there, tables otherwise; page, pictures."""
    from epfuse.bench.record import to_text
    from epfuse.report.write import write_atomic

    if kept is not None:
        with delivery.of("--json"):
            write_atomic(kept, to_text(record))
    with delivery.of(STDOUT):
        if print_json:
            values = record.to_json() | ({"comparison": comparison.to_json()} if comparison else {})
            click.echo(jsonlib.dumps(values, indent=2, allow_nan=False))
        else:
            from epfuse.bench.console import print_record
            from epfuse.report.terminal import stdout

            print_record(record, comparison, stdout(FILE_WIDTH))
            if "--json" in delivery.failed:  # the tables have not all of it
                click.echo(to_text(record), nl=False)
    if html is not None:
        with delivery.of("--html"):
            from epfuse.bench.page import bench_page

            write_atomic(html, bench_page(record, comparison))
            click.echo(f"page: {html}", err=True)
    if pictures is not None:
        with delivery.of("--pictures"):
            _write_pictures(record, pictures)


def _write_pictures(record: BenchRecord, folder: Path) -> None:
    from epfuse.bench.charts import charts_of
    from epfuse.bench.page import chart_svg
    from epfuse.bench.png import chart_png
    from epfuse.errors import MissingDependency
    from epfuse.report.write import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts_of(record):
        write_atomic(folder / f"{chart.name}.svg", chart_svg(chart))
        try:
            write_atomic(folder / f"{chart.name}.png", chart_png(chart))
        except MissingDependency as missing:
            click.echo(f"only SVG: {missing}", err=True)
    click.echo(f"pictures: {folder}", err=True)
