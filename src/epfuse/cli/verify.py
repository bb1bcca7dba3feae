"""``epfuse verify``: run the correctness suite and show its record."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.names import layer_sizes, token_count
from epfuse.config import Bias, Combine, Path
from epfuse.errors import DeviceError
from epfuse.report.terminal import Console, bars, figures, make_table

if TYPE_CHECKING:
    from epfuse.verify.record import CaseResult, VerifyRecord

PATH_CHOICES = ["all", *(path.value for path in Path)]
SHAPE_NAMES = ["small", "minimax-m3"]
DTYPE_NAMES = ["bfloat16", "float16", "float32"]
ACTIVATION_NAMES = ["swiglu-oai", "gelu-tanh", "softcapped-swiglu", "relu2"]


def _tokens(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(token_count(text) for text in values)


EPILOG = """\b
Examples:
  epfuse verify
  epfuse verify --shape minimax-m3 --tokens 1 --tokens 300
  torchrun --nproc-per-node 2 -m epfuse verify --distributed
"""


@click.command(epilog=EPILOG)
@click.option(
    "--shape", type=click.Choice(SHAPE_NAMES), default="small", show_default=True, help="Sizes to start from."
)
@click.option("--tokens", multiple=True, callback=_tokens, metavar="T", help="Token count; may be given several times.")
@layer_sizes("Ranks; the device plays them in turn.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="bfloat16", show_default=True)
@click.option("--activation", type=click.Choice(ACTIVATION_NAMES), default="swiglu-oai", show_default=True)
@click.option("--bias", type=click.Choice([bias.value for bias in Bias]), default="none", show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N (CUDA and ROCm).  [default: cuda if there is one]")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True)
@click.option("--path", "choice", type=click.Choice(PATH_CHOICES), default="all", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON instead of the table.")
@click.option(
    "--distributed",
    is_flag=True,
    help="Over the ranks that torchrun started: the sum over them, in every exchange mode and placement.",
)
def verify(
    shape: str,
    tokens: tuple[int, ...],
    sizes: dict[str, int | None],
    dtype: str,
    activation: str,
    bias: str,
    device: str | None,
    seed: int,
    choice: str,
    as_json: bool,
    distributed: bool,
) -> None:
    """Check every path of a device against a float64 oracle.

    Each rank's output is compared with a float64 computation of the same rank, and the sum over all ranks with a
    second, independent one of the unsharded layer: for ordinary and skewed routings, no local route, duplicate
    and foreign expert ids, a NaN router weight, clamped, outlying and zero activations; into poisoned memory, twice,
    and on a GPU also replayed from a captured graph. Paths with FP8 weights start from the same weights in MXFP8, which
    need sizes that are multiples of 32.

    With --distributed, under torchrun, every rank computes its share, torch.distributed adds them up, and the sum is
    what is judged: tokens on every rank or on their own, experts in order and strided, sums in float32 and in the
    dtype, on GPUs also in captured graphs with the collectives in them. Rank 0 shows the record.
    """
    from epfuse.verify.problem import ACTIVATIONS, DEFAULT_TOKENS, DTYPES, SHAPES, Problem

    named, ep_size = SHAPES[shape], sizes.pop("ep_size")
    whole = {name: size or getattr(named, name) for name, size in sizes.items()}
    if distributed:
        from epfuse.cli.verify_distributed import verify_distributed

        for option, value in (("--device", device), ("--ep-size", ep_size)):
            if value is not None:
                raise click.UsageError(f"{option} does not go with --distributed: torchrun says which ranks there are")
        verify_distributed(whole, tokens, dtype, seed, choice, as_json)
    import torch

    from epfuse.cli.device import check_memory, choose_device
    from epfuse.verify import suite
    from epfuse.verify.subject import subjects_of

    problem = Problem(
        **whole,
        ep_size=ep_size or named.experts // named.local_experts,
        tokens=tokens or DEFAULT_TOKENS,
        dtype=DTYPES[dtype],
        device=choose_device(device),
        seed=seed,
        activation=ACTIVATIONS[activation],
        bias=Bias(bias),
    )
    subjects = subjects_of(problem, choice)
    delivery = Delivery()
    check_memory(suite.least_bytes(problem, subjects), problem.device, "these sizes")
    with bars() as progress:
        paths = ", ".join(dict.fromkeys(subject.path.value for subject in subjects))
        task = progress.add_task(f"verifying {paths}", total=suite.steps_of(problem, subjects))
        try:
            record = suite.run(
                problem,
                subjects,
                lambda: progress.advance(task),
                say=lambda what: progress.update(task, description=f"verifying {paths}: {what}"),
            )
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"{problem.device} is out of memory; it needs fewer --tokens or a larger --ep-size"
            ) from None
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(record.to_json(), indent=2, allow_nan=False))
        else:
            _show(record)
    delivery.exit(passed=record.ok)


def _show(record: VerifyRecord) -> None:
    from epfuse.verify.record import ORACLE

    console = Console()
    problem = record.problem
    console.print(
        f"H={problem.hidden} I={problem.intermediate} E={problem.experts} K={problem.top_k} P={problem.ep_size} "
        f"{problem.dtype} on {problem.device} ({problem.target.value})\n"
        "Worst of any rank and of their sum. SNR: of a token; error: of a call, norm over the oracle's norm.",
        highlight=False,
    )
    table = make_table("path, weights", "scenario", *map(figures, ("T", "SNR dB", "min", "error", "max")), "result")
    for case in record.cases:
        if case.path != ORACLE or not case.ok:
            table.add_row(_subject(case), case.name, str(case.tokens), *_figures(case), _result(case.ok))
    oracles = [case for case in record.cases if case.path == ORACLE]
    agree = all(case.ok for case in oracles)
    table.add_row(ORACLE, f"{len(oracles)} oracle pairs", "", *_figures(_worst(oracles)), _result(agree))
    console.print(table)
    for case in record.cases:
        for failure in case.failures:
            console.print(
                f"FAIL {_subject(case)}, {case.name}, T={case.tokens}: {failure}", markup=False, highlight=False
            )
    passed = sum(case.ok for case in record.cases)
    console.print(f"{passed} of {len(record.cases)} cases passed", highlight=False)


def _worst(cases: list[CaseResult]) -> CaseResult:
    return min(cases, key=lambda case: case.snr_db)


def _result(ok: bool) -> str:
    return "[green]pass" if ok else "[red]FAIL"


def _subject(case: CaseResult) -> str:
    words = [case.path] if case.weights == case.path else [case.path, case.weights]
    return " ".join(words if case.combine == Combine.DETERMINISTIC.value else [*words, case.combine])


def _figures(case: CaseResult) -> tuple[str, ...]:
    if case.tolerance is None:
        return ("",) * 4
    snr = "equal" if case.snr_db == math.inf else f"{case.snr_db:.1f}"
    bounds = case.tolerance
    return snr, f"{bounds.snr_db:.1f}", f"{case.relative_error:.1e}", f"{bounds.relative_error:.1e}"
