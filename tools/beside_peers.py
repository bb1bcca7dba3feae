"""Time epfuse and other people's kernels on one layer, in the harness of the peers, into one record.

    python -m tools.beside_peers HARNESS record.json --picture picture.svg
    python -m tools.beside_peers HARNESS record.json --paths w8a16,w8a8,bf16,block_fp8 --tokens 1,16,256,2048
    python -m tools.beside_peers HARNESS record.json --layer gpt-oss-120b --tokens 1,16,256,2048

The harness is one file of its own (docs/performance.md, "Beside the fastest peers"), which checks every kernel against
float64 before it times it. It knows one kernel of ours and times it last, so that what its time limit leaves out is
ours: it runs as a copy in which each of our paths is a kernel, and comes first. Sizes go to it by its environment.
Where top-k or routing are not its own, the copy has them replaced. The record is written after each kernel.

    python -m tools.beside_peers HARNESS record.json --draw 40 --seed 7 --humming 1

Token counts can be drawn by a seed, for points that nobody tuned. Every configuration of humming is a kernel that must
be compiled first: --humming 1 leaves its own choice alone, and of Marlin's its blocks of rows.

    python -m tools.beside_peers HARNESS record.json --shapes all --draw 6 --seed 7 --humming 1
    python -m tools.beside_peers HARNESS record.json --shapes minimax-m3-ep8 --draw 40 --seed 7 --humming 1

Ranks of other models (tools/peer_shapes.py), each at counts of its own, in few processes: tools/peer_layers.py.

For tools/draw_peers.py and tests/docs/test_performance.py a record is what this writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from tools.draw_peers import chart_of, check_rows
from tools.peer_harness import harness_for
from tools.peer_layers import PeerLayer, PeerTimes, is_right, layers_of, text_of, time_layers
from tools.peer_shapes import TWELVE, shard

from epfuse.bench.layers import LAYERS, Layer
from epfuse.bench.machine import commit, versions
from epfuse.bench.page import chart_svg
from epfuse.bench.routing import Routing
from epfuse.children import Children
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.exits import PlainCommand
from epfuse.cli.names import comma_names, token_counts
from epfuse.errors import ConfigError
from epfuse.input_file import read_file, read_json
from epfuse.report.write import write_atomic

IMPLEMENTATION = f"{Path(__file__).resolve().parents[1]}/benchmarks/peer_layer.py:w8a16"
PATHS = ("w8a16", "w8a8", "bf16", "block_fp8")
PEERS = "humming_w8a16_indexed,vllm_marlin_tuned,humming_w8a16_grouped,triton_kernels_bf16"
OURS = "impl"
MOST_DRAWN = 16384
EXAMPLE = "Example: python -m tools.beside_peers peers.py record.json --layer qwen3-235b --tokens 1,2048"
CEILING = re.compile(
    r"^ceiling +(.+): copy ([\d.]+) TB/s \(read \+ written\), read ([\d.]+) TB/s, bf16 8192\^3 (\d+)", re.M
)


def name_of(path: str) -> str:
    """What the harness' copy and a record call a path of ours."""
    return OURS if path == "w8a16" else f"{OURS}_{path}"


def is_ours(name: str) -> bool:
    """Whether a kernel is one of our paths."""
    return name in map(name_of, PATHS)


def drawn_counts(count: int, seed: int | str) -> tuple[int, ...]:
    """So many different token counts of 1..`MOST_DRAWN`, ascending; as many between each two powers of two."""
    dice, found = random.Random(seed), set[int]()
    while len(found) < count:
        found.add(round(2 ** dice.uniform(0, math.log2(MOST_DRAWN))))
    return tuple(sorted(found))


Printed = tuple[str, list[dict[str, Any]]]
"""What a run of the harness has printed, and its rows."""


def run_harness(
    harness: Path,
    layer: Layer,
    arguments: list[str],
    folder: Path,
    keep: Callable[[Printed], None] = lambda found: None,
) -> Printed:
    """One run. ``keep`` is called with what there is each time that the harness has written its rows.

    Raises:
        ConfigError: it did not accept its arguments; a kernel that fails is no reason for it to fail.
    """
    out = folder / "rows.json"
    out.unlink(missing_ok=True)
    shape = layer.shape
    sizes = {"H": shape.hidden, "I": shape.intermediate, "E": shape.experts, "EL": shape.local_experts}
    environment = os.environ | {f"PEER_{name}": str(size) for name, size in sizes.items()}
    command = [sys.executable, str(harness), "--impl", IMPLEMENTATION, *arguments, "--out", str(out)]
    lines, kept = [], 0
    with (
        Children() as children,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, process_group=children.id
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            click.echo(line, nl=False, err=True)
            lines.append(line)
            if (size := out.stat().st_size if out.exists() else 0) != kept:
                with contextlib.suppress(ConfigError):  # it may be writing just now
                    keep(("".join(lines), check_rows(read_json(out, "rows of the harness"))))
                    kept = size
    if process.returncode:
        raise ConfigError(f"the harness ended with exit code {process.returncode}; what it printed says why")
    return "".join(lines), check_rows(read_json(out, "rows of the harness")) if out.exists() else []


def record_of(printed: str, rows: list[dict[str, Any]], layer: Layer, routing: Routing) -> dict[str, Any]:
    """The record of a run: of every kernel the best of its configurations.

    Raises:
        ConfigError: the harness has measured no roofs.
    """
    return {"layer": layer.name, **circumstances(printed, routing), "rows": [row for row in rows if row["best"]]}


def circumstances(printed: str, routing: Routing) -> dict[str, Any]:
    """What a record says besides its rows.

    Raises:
        ConfigError: the harness has measured no roofs.
    """
    roofs = CEILING.search(printed)
    if roofs is None:
        raise ConfigError("the harness printed no line of its ceiling: its first measurement did not end")
    installed, code = versions(), commit()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": roofs[1],
        "torch": installed["torch"],
        "triton": installed["triton"],
        "epfuse": None if code is None else code["hash"][:7] + (", changed" if code["changed"] else ""),
        "routing": str(routing),
        "copy_tb_s": float(roofs[2]),
        "read_tb_s": float(roofs[3]),
        "bf16_tflop_s": int(roofs[4]),
        "note": "us: the best configuration, timed again for 9 times 20 ms; sweep: every configuration, 5 times 8 ms,"
        " with its relative error. Ours ran first.",
    }


def table_of(record: dict[str, Any]) -> str:
    """Microseconds by kernel and token count, and each of ours over the fastest peer, as Markdown; then their means."""
    right = [row for row in record["rows"] if is_right(row)]
    times: dict[str, dict[int, float]] = {}
    for row in right:
        times.setdefault(row["peer"], {})[row["T"]] = row["us"]
    counts = sorted({row["T"] for row in right})
    lines = [["tokens", *(str(count) for count in counts)], ["---"] * (len(counts) + 1)]
    for peer, of_peer in sorted(times.items(), key=lambda item: is_ours(item[0])):
        lines.append([peer, *(f"{of_peer[count]:.1f}" if count in of_peer else "-" for count in counts)])
    peers = [of_peer for peer, of_peer in times.items() if not is_ours(peer)]
    fastest = {count: min((of_peer[count] for of_peer in peers if count in of_peer), default=None) for count in counts}
    means = []
    for path in PATHS:
        ours = times.get(name_of(path), {})
        pairs = [(ours.get(count), fastest[count]) for count in counts]
        if ours:
            ratios = [f"{us / best:.3f}" if us and best else "-" for us, best in pairs]
            lines.append([f"{path} over the fastest peer", *ratios])
            known = [(us / best, count) for count, (us, best) in zip(counts, pairs, strict=True) if us and best]
            if known:
                most, at = max(known)
                mean = statistics.geometric_mean(ratio for ratio, _ in known)
                means.append(f"{path}: geometric mean of {len(known)} {mean:.3f}, at most {most:.3f}, at {at} tokens\n")
    wrong = [
        f"wrong: {row['peer']} at {row['T']} tokens, error {row['err']:.2g}\n"
        for row in record["rows"]
        if not is_right(row)
    ]
    return "".join([*(f"| {' | '.join(line)} |\n" for line in lines), "\n", *means, *wrong])


def measure(
    source: str, layer: Layer, routing: Routing, tokens: tuple[int, ...], kernels: str, seconds: float,
    jobs: int | None, keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Compile ``kernels`` unless ``jobs`` is None, then time them in ``seconds``. ``keep`` gets what there is.

    Raises:
        ConfigError: as `run_harness` and `record_of` say.
    """

    def made(found: Printed) -> dict[str, Any]:
        return record_of(*found, layer, routing)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness = folder / "harness.py"
        harness.write_text(source)
        common = ["--tokens", ",".join(map(str, tokens)), "--logs", name, "--only", kernels, "--budget", str(seconds)]
        if jobs is not None:
            run_harness(harness, layer, [*common, "--phase", "compile", "--jobs", str(jobs)], folder)
        found = run_harness(harness, layer, [*common, "--phase", "time"], folder, lambda found: keep(made(found)))
    return made(found)


def measure_layers(
    source: str, shapes: tuple[str, ...], routing: Routing, counts_of: Callable[[str], tuple[int, ...]],
    paths: tuple[str, ...], peers: str, humming: int | None, seconds: float, jobs: int | None,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """The record of all kernels on ranks of models, ``keep`` as `measure` has it.

    Raises:
        ConfigError: no model has that name, or as `harness_for` and `circumstances` say.
    """
    layers = [shard(name) for name in shapes]
    for layer in layers:
        routing.check(layer.shape)
    points = [
        PeerLayer(layer, counts_of(layer.name), harness_for(source, layer, routing, paths, peers, humming))
        for layer in layers
    ]

    def made(found: PeerTimes) -> dict[str, Any]:
        layers = [
            {
                "layer": point.layer.name,
                "shape": asdict(point.layer.shape),
                "tokens": point.tokens,
                "rows": found.rows[point.layer.name],
            }
            for point in points
        ]
        own = layers[0] if len(layers) == 1 else {"layers": layers}  # one layer's record is as `record_of` has it
        return circumstances(found.roofs, routing) | own | {"failed": found.failed, "left_out": found.left_out}

    kernels = [*map(name_of, paths), *peers.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return made(
            time_layers(points, kernels, paths, IMPLEMENTATION, seconds, jobs, folder, lambda found: keep(made(found)))
        )


def shape_names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """A callback for --shapes."""
    if value is None:
        return None
    return TWELVE if value == "all" else tuple(dict.fromkeys(value.split(",")))


@click.command(cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLE)
@click.argument("harness", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("record", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layer", "name", type=click.Choice(list(LAYERS)), default="minimax-m3-ep8", show_default=True)
@click.option(
    "--shapes", callback=shape_names, help="Ranks such as glm-4.5-tp4 in place of --layer, or 'all' for twelve of them."
)
@click.option("--routing", default="uniform", show_default=True, help="uniform, zipf:S or all-to:N.")
@click.option("--tokens", callback=token_counts, default="1,16,64,256,512,1024,2048,8192", show_default=True)
@click.option(
    "--paths", callback=comma_names(PATHS), default="w8a16", show_default=True, help=f"Of {', '.join(PATHS)}."
)
@click.option("--draw", type=click.IntRange(1, 1000), help="So many token counts, drawn, in place of --tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of --draw.")
@click.option(
    "--humming",
    type=click.IntRange(1),
    help="Configurations of each of humming's kernels, and few of Marlin's.  [default: all]",
)
@click.option("--peers", default=PEERS, show_default=True, help="Names of the harness' own kernels.")
@click.option("--seconds", type=click.FloatRange(min=1), default=300, show_default=True, help="For all of the timing.")
@click.option("--jobs", type=click.IntRange(1), default=8, show_default=True, help="Processes that compile.")
@click.option("--compiled", is_flag=True, help="All kernels are in the caches: time at once.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="An SVG of the record.")
def main(
    harness: Path, record: Path, name: str, shapes: tuple[str, ...] | None, routing: str, tokens: tuple[int, ...],
    paths: tuple[str, ...], draw: int | None, seed: int, humming: int | None, peers: str, seconds: float, jobs: int,
    compiled: bool, picture: Path | None,
) -> None:  # fmt: skip
    """Compile, time ours, then the peers, and write RECORD.

    Exit code 1: no time of ours that is right, or none of any peer; 2: usage, or an output that could not be written.
    """
    layer = LAYERS[name]
    if shapes is not None and len(shapes) > 1 and picture is not None:
        raise click.UsageError("--picture shows one layer, not several of --shapes")
    delivery = Delivery({"RECORD": record, "--picture": picture})
    chosen = Routing.parse(routing)
    chosen.check(layer.shape)
    source = read_file(harness, "harness").decode()

    def keep(grown: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the measurement goes on; the last write, of all, counts
            write_atomic(record, json.dumps(grown, indent=1) + "\n")

    if shapes is None:
        source = harness_for(source, layer, chosen, paths, peers, humming)
        if draw is not None:
            tokens = drawn_counts(draw, seed)
        kernels = ",".join([*map(name_of, paths), peers])
        found = measure(source, layer, chosen, tokens, kernels, seconds, None if compiled else jobs, keep)
        table, rows = table_of(found), found["rows"]
    else:

        def counts_of(rank: str) -> tuple[int, ...]:
            return tokens if draw is None else drawn_counts(draw, f"{seed} {rank}")

        workers = None if compiled else jobs
        found = measure_layers(source, shapes, chosen, counts_of, paths, peers, humming, seconds, workers, keep)
        table = "\n".join(f"{path}\n\n{text_of(found, name_of(path))}" for path in paths)
        if len(shapes) == 1:
            table = f"{table_of(found)}\n{table}"
        rows = [row for each in layers_of(found) for row in each["rows"]]
    right = [row for row in rows if is_right(row)]
    text = json.dumps(found, indent=1) + "\n"
    with delivery.of("RECORD"):
        write_atomic(record, text)
    with delivery.of(STDOUT):
        click.echo(text if "RECORD" in delivery.failed else table)
    if picture is not None:
        with delivery.of("--picture"):
            write_atomic(picture, chart_svg(chart_of(found | {"rows": right})))
    timed = {is_ours(row["peer"]) for row in right}
    if timed != {True, False}:
        click.echo("no time of ours" if True not in timed else "no time of any peer", err=True)
    delivery.exit(passed=timed == {True, False})


if __name__ == "__main__":
    main()
