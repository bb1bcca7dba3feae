"""Time a layer on this CPU with "epfuse" beside each of transformers' own experts implementations.

All are called as a model calls them: the experts module, with the implementation that its configuration names.

    python -m tools.cpu_beside_transformers
    python -m tools.cpu_beside_transformers --dtype bf16 --tokens 1,16 --repeats 40 --json

Every repeat runs all of them once, in another order each time, so that what else the machine does hits all alike: read
the ratios, which are medians over the repeats, with the middle half of them beside; the last column is of each one's
fastest call, which a busy machine disturbs least. With ``--processor-time`` and one thread (OMP_NUM_THREADS=1) what
others run on the cores does not count but for the caches and the memory that they take. One that takes over 30 times as
long as the fastest in a first run is not repeated. batched_mm copies an expert's weights for each route; where that
takes over 2 GiB it is left out.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch

from epfuse.bench.machine import versions
from epfuse.cli.exits import PlainCommand
from epfuse.cli.names import token_counts
from epfuse.integrations.transformers import register

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS = "epfuse"
RIVALS = ("eager", "batched_mm", "grouped_mm")
HOPELESS = 30
MOST_COPIED = 2 << 30
"""Bytes."""
EXAMPLE = "Example: python -m tools.cpu_beside_transformers --dtype bf16 --tokens 1,16"
H, I, E, K = 1024, 512, 32, 4  # noqa: E741 - the letters of DESIGN.md


def contenders(dtype: torch.dtype, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> one call, on the same weights and routes."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    module = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    module.gate_up_proj.normal_(0, H**-0.5)
    module.down_proj.normal_(0, I**-0.5)
    hidden = torch.randn(tokens, H).to(dtype)
    scores, ids = torch.rand(tokens, E).topk(K)
    scores = scores / scores.sum(-1, keepdim=True)
    cast = scores.to(dtype)

    def implementation(name: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            config._experts_implementation = name
            return module(hidden, ids, cast)

        return call

    copied = tokens * K * 3 * H * I * dtype.itemsize
    names = [name for name in (*RIVALS, OURS) if name != "batched_mm" or copied <= MOST_COPIED]
    return {name: implementation(name) for name in names}


def timed(call: Callable[[], torch.Tensor], clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def measure(dtype: torch.dtype, tokens: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """One row of the table, of whichever seconds ``clock`` tells.

    Raises:
        RuntimeError: epfuse's result is not the others'.
    """
    calls = contenders(dtype, tokens)
    error = (calls[OURS]().double() - calls["eager"]().double()).norm() / calls["eager"]().double().norm()
    if not error < 8 * torch.finfo(dtype).eps:
        raise RuntimeError(f"epfuse is {error:.1e} off transformers' eager experts at {tokens} tokens")
    first = {name: timed(call, clock) for name, call in calls.items()}
    names = [name for name in calls if first[name] <= HOPELESS * min(first.values())]
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0)
    for _ in range(repeats):
        for name in shuffle.sample(names, len(names)):
            times[name].append(timed(calls[name], clock))
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min((name for name in names if name != OURS), key=lambda name: medians[name])
    low, ratio, high = statistics.quantiles(
        [own / other for own, other in zip(times[OURS], times[best], strict=True)], n=4
    )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "milliseconds": medians,
        "best": best,
        "ratio": ratio,
        "middle_half": [low, high],
        "fastest": {name: min(found) for name, found in times.items()},
    }


@click.command(cls=PlainCommand, help="Time a layer on this CPU with epfuse beside transformers. " + EXAMPLE)
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=("bf16", "fp32"))
@click.option("--tokens", callback=token_counts, default="1,16,256,1024", show_default=True, help="Token counts.")
@click.option("--repeats", type=click.IntRange(3, 10_000), default=20, show_default=True, help="Of each.")
@click.option("--processor-time", is_flag=True, help="Of the process, not of the clock on the wall; for one thread.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@torch.no_grad()
def main(dtypes: tuple[str, ...], tokens: tuple[int, ...], repeats: int, processor_time: bool, as_json: bool) -> None:
    """The whole run."""
    clock = time.process_time if processor_time else time.perf_counter
    register()
    torch.manual_seed(0)
    rows = []
    head = f"{'dtype':9}{'tokens':>7}  " + "".join(f"{name:>12}" for name in (*RIVALS, OURS)) + "   epfuse/best"
    if not as_json:
        what = "milliseconds of processor time" if processor_time else "milliseconds"
        print(f"H {H}, I {I}, E {E}, K {K}, {torch.get_num_threads()} threads; {what}, medians of {repeats}")
        print(head)
    for dtype in dtypes:
        for count in tokens:
            print(f"{dtype} {count} tokens ..", file=sys.stderr)
            row = measure(DTYPES[dtype], count, repeats, clock)
            rows.append(row)
            if not as_json:
                cells = [row["milliseconds"].get(name) for name in (*RIVALS, OURS)]
                shown = "".join(f"{'-' if cell is None else format(cell, '.2f'):>12}" for cell in cells)
                low, high = row["middle_half"]
                fastest = row["fastest"][OURS] / min(row["fastest"][name] for name in row["fastest"] if name in RIVALS)
                best = f"{row['ratio']:.2f} ({low:.2f}..{high:.2f}) of {row['best']}, {fastest:.2f}"
                print(f"{row['dtype']:9}{count:>7}  {shown}   {best}")
    if as_json:
        shape = {"hidden": H, "intermediate": I, "experts": E, "top_k": K}
        print(json.dumps({"versions": versions(), "threads": torch.get_num_threads(), "shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
