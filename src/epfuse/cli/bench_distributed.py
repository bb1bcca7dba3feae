"""``epfuse bench --distributed``: one layer over the ranks that torchrun started."""

from __future__ import annotations

import contextlib
import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from epfuse.bench import distributed, machine
from epfuse.bench.contender import chosen_subjects, problem_of
from epfuse.bench.layers import make_layer
from epfuse.bench.measure import QUICK, THOROUGH
from epfuse.bench.routing import Routing
from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.ranks import first_ranks_bar, ranks_of
from epfuse.parallel.launch import RankContext
from epfuse.parallel.torchrun import torchrun_ranks
from epfuse.report.terminal import figures, make_table, stdout
from epfuse.report.write import write_atomic

GPU_TOKENS = (1, 16, 64, 256, 1024, 8192)
CPU_TOKENS = (1, 16, 64)
FILE_WIDTH = 150
"""Columns of the table where no terminal says how many it has."""


def bench_distributed(
    shape: str | None,
    sizes: dict[str, int | None],
    activation: str | None,
    tokens: tuple[int, ...],
    paths: tuple[str, ...] | None,
    routing: str,
    json_file: str | None,
    seed: int,
    quick: bool,
) -> NoReturn:
    """Measure on every rank; rank 0 shows the record, all end with its exit code."""
    kept = None if json_file in (None, "-") else Path(str(json_file))
    delivery = Delivery({"--json": kept})
    with torchrun_ranks() as context:
        on_gpu, first = context.device.type == "cuda", context.group.rank == 0
        named = shape or ("minimax-m3-ep8" if on_gpu else "small")
        layer = make_layer(named, sizes | {"ep_size": context.group.size}, activation)
        plan = distributed.DistributedPlan(
            layer=layer,
            tokens=tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS),
            routings=tuple(dict.fromkeys(Routing.parse(text) for text in routing.split(","))),
            seed=seed,
            sampling=QUICK if quick else THOROUGH,
        )
        for one in plan.routings:
            one.check(layer.shape)
        subjects = chosen_subjects(problem_of(layer, plan.tokens, context.device, seed), paths or ())
        record = _about(context, plan)
        rows: list[distributed.DistributedRow] = []
        with first_ranks_bar(context, "starting", None) as advance:
            for row in distributed.run(context, plan, subjects, advance):
                rows.append(row)
                if kept is not None and first:
                    with contextlib.suppress(OSError):  # the measurement goes on; the last write, of all, counts
                        write_atomic(kept, _text(record, rows, complete=False))
        if first:  # before the others end: torchrun ends all when one has
            if kept is not None:
                with delivery.of("--json"):
                    write_atomic(kept, _text(record, rows, complete=True))
            with delivery.of(STDOUT):
                if json_file == "-":
                    click.echo(_text(record, rows, complete=True), nl=False)
                else:
                    _show(record, rows)
    delivery.exit(passed=all(row.failure is None for row in rows))


def _about(context: RankContext, plan: distributed.DistributedPlan) -> dict[str, Any]:
    return {
        "format": distributed.FORMAT,
        "run": machine.run_facts(["epfuse"], seed=plan.seed),
        "device": machine.describe_device(context.device),
        "ranks": ranks_of(context),
        "layer": {"name": plan.layer.name, **asdict(plan.layer.shape)},
    }


def _text(record: dict[str, Any], rows: list[distributed.DistributedRow], complete: bool) -> str:
    found = {"ok": all(row.failure is None for row in rows), "complete": complete}
    values = record | found | {"rows": [row.to_json() for row in rows]}
    return jsonlib.dumps(values, indent=2, allow_nan=False) + "\n"


def _show(record: dict[str, Any], rows: list[distributed.DistributedRow]) -> None:
    console = stdout(FILE_WIDTH)
    layer, ranks = record["layer"], record["ranks"]
    console.print(
        f"{layer['name']}: H={layer['hidden']} I={layer['intermediate']} E={layer['experts']} K={layer['top_k']},"
        f" {ranks['size']} ranks of {record['device']['name']}, {ranks['backend']}\n"
        "Microseconds, medians. shard: the slowest rank's share alone; sum: all_reduce of [T, H] alone, float32 and as"
        " given; step: both together;\nstep/parts: the faster step over shard and the faster sum; the rest: other"
        " exchange modes, share and collectives together.",
        highlight=False,
    )
    others = list(dict.fromkeys(name for row in rows for name in row.exchanges if name not in distributed.SUMS))
    numbers = ("T", "imbalance", "shard", "sum f32", "sum", "step f32", "step", "step/parts", *others)
    table = make_table("path", "routing", *map(figures, numbers))
    for row in rows:
        if row.failure is not None:
            continue
        ratio = row.over_parts
        table.add_row(
            row.path,
            row.routing,
            str(row.tokens),
            f"{row.imbalance:.2f}",
            f"{row.slowest_shard_us:.1f}",
            *(f"{row.sums[name].median_us:.1f}" for name in distributed.SUMS),
            *(f"{row.exchanges[name].median_us:.1f}" for name in distributed.SUMS),
            "" if ratio is None else f"{ratio:.2f}",
            *(f"{row.exchanges[name].median_us:.1f}" for name in others),
        )
    console.print(table)
    for row in rows:
        if row.failure is not None:
            console.print(f"FAIL {row.path} {row.routing} T={row.tokens}: {row.failure}", markup=False, highlight=False)
