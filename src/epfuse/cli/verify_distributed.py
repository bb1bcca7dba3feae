"""``epfuse verify --distributed``: the suite over the ranks that torchrun started."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.ranks import first_ranks_bar, ranks_of
from epfuse.config import Path
from epfuse.parallel.torchrun import torchrun_ranks
from epfuse.report.terminal import figures, make_table, stdout
from epfuse.verify import distributed
from epfuse.verify.problem import DEFAULT_TOKENS, DTYPES, Problem
from epfuse.verify.record import VerifyRecord
from epfuse.verify.subject import subjects_of

FILE_WIDTH = 110
"""Columns of the table where no terminal says how many it has."""


def verify_distributed(
    sizes: dict[str, Any],
    tokens: tuple[int, ...],
    dtype: str,
    seed: int,
    choice: str,
    as_json: bool,
) -> NoReturn:
    """Run the suite on every rank; rank 0 shows the record, all end with its exit code."""
    delivery = Delivery()
    with torchrun_ranks() as context:
        problem = Problem(
            **sizes,
            ep_size=context.group.size,
            tokens=tokens or DEFAULT_TOKENS,
            dtype=DTYPES[dtype],
            device=context.device,
            seed=seed,
        )
        subjects = subjects_of(problem, choice)
        if choice == "all" and problem.target.is_gpu:  # of whose paths it is the oracle, and slow at true size
            subjects = tuple(subject for subject in subjects if subject.path is not Path.REFERENCE)
        first = context.group.rank == 0
        words, steps = f"verifying over {context.group.size} ranks", distributed.steps_of(problem, subjects)
        with first_ranks_bar(context, words, steps) as advance:
            record = distributed.run(context, problem, subjects, advance)
        ranks = ranks_of(context)
        if first:  # before the others end: torchrun ends all when one has
            with delivery.of(STDOUT):
                if as_json:
                    click.echo(json.dumps(record.to_json() | {"ranks": ranks}, indent=2, allow_nan=False))
                else:
                    _show(record, ranks)
    delivery.exit(passed=record.ok)


def _show(record: VerifyRecord, ranks: dict[str, object]) -> None:
    console, problem = stdout(FILE_WIDTH), record.problem
    console.print(
        f"H={problem.hidden} I={problem.intermediate} E={problem.experts} K={problem.top_k} {problem.dtype},"
        f" {ranks['size']} ranks on {problem.device.type} ({problem.target.value}), {ranks['backend']}\n"
        "Worst of all scenarios, token counts and ranks. SNR: of a token; error: of a call, norm over the oracle's.",
        highlight=False,
    )
    numbers = map(figures, ("cases", "SNR dB", "error", "replays"))
    table = make_table("path, weights", "placement", "exchange", *numbers, "result")
    groups: dict[tuple[str, ...], list[distributed.RankCase]] = {}
    for case in record.cases:
        assert isinstance(case, distributed.RankCase)
        groups.setdefault((case.path, case.weights, case.combine, case.placement, case.exchange), []).append(case)
    for (path, weights, combine, placement, exchange), cases in groups.items():
        sums = [case for case in cases if case.tolerance is not None]
        replays = [case for case in cases if case.tolerance is None]
        passed = all(case.ok for case in cases)
        table.add_row(
            " ".join(dict.fromkeys([path, weights, *([combine] if combine != "deterministic" else [])])),
            placement,
            exchange,
            str(len(sums)),
            f"{min(case.snr_db for case in sums):.1f}",
            f"{max(case.relative_error for case in sums):.1e}",
            "equal" if replays and all(case.ok for case in replays) else "DIFFER" if replays else "",
            "[green]pass" if passed else "[red]FAIL",
        )
    console.print(table)
    for case in record.cases:
        for failure in case.failures:
            assert isinstance(case, distributed.RankCase)
            where = f"{case.path} {case.weights}, {case.placement}, {case.exchange}, {case.name}, T={case.tokens}"
            console.print(f"FAIL {where}: {failure}", markup=False, highlight=False)
    console.print(f"{sum(case.ok for case in record.cases)} of {len(record.cases)} cases passed", highlight=False)
