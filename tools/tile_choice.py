"""Time the tiles that calls take beside the nearest row's, at token counts and shapes that nothing was fitted on.

    python -m tools.tile_choice FILE --seconds 110

The points are drawn by the digest of the fitted numbers, so nobody chose them after a fit. Every result is held against
float64 before it is timed; a wrong one has no time. At some points every tile that was best anywhere on the product
near such a count is timed too, and at prefill counts the blocks that no row has.

    python -m tools.tile_choice FILE --full 12 --seconds 250

Token counts of MiniMax-M3 under EP8, drawn by the same digest, with every tile of the tuner's full space: each stage
alone in every tile, and the best of each block as whole calls, in brief timings. Then today's tiles and the best found
are timed in turn, for longer. Compiling is not in the seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton

from epfuse.aot.launches import Launch, launches_of
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Sampling
from epfuse.compiled.warm_up import compile_all, missing
from epfuse.config import LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.families.family import CallKind
from epfuse.hardware.tile_time import call_us
from epfuse.measured.fits import fit_of, fit_path
from epfuse.measured.lookup import sources
from epfuse.measured.store import TABLES
from epfuse.policy.decision import TileChoice
from epfuse.policy.tiles import nearest_ranges, tile_ranges
from epfuse.policy.timed import candidates, overruled
from epfuse.report.write import write_atomic
from epfuse.stages.tiles import LayerTiles, rows_per_expert
from epfuse.target import Target
from epfuse.tuning.bench import DeviceBench
from epfuse.tuning.calls import bind_layer, layer_call
from epfuse.tuning.prune import candidates_of, distinct, unfit
from epfuse.tuning.run import Device, TuningRequest, plan_of
from epfuse.tuning.search import TuningPoint, search, without
from epfuse.weights.experts import ExpertWeights

M3 = LayerShape(6144, 3072, 128, 16, 4)
SHAPES = {
    "DeepSeek-V3 EP16": LayerShape(7168, 2048, 256, 16, 8),
    "Kimi-K2 EP32": LayerShape(7168, 2048, 384, 12, 8),
    "GLM-4.5 EP16": LayerShape(5120, 1536, 160, 10, 8),
    "Qwen3-235B EP8": LayerShape(4096, 1536, 128, 16, 8),
    "Mixtral-8x22B EP8": LayerShape(6144, 16384, 8, 1, 2),
    "MiniMax-M2 EP8": LayerShape(3072, 1536, 256, 32, 8),
}
FAR = 4.0
"""All tiles that were best at so many times fewer or more rows an expert are timed where all are."""
BRIEF = Sampling(samples=3, seconds=0.002)
ASKED = (Path.W8A16, WeightFormat.FRAGMENT)


def draw(device: str) -> list[tuple[str, LayerShape, int, bool]]:
    """Name, shape, T and whether every tile is timed, by the digest of the fit."""
    fit = fit_of(Target.SM90, device, *ASKED)
    assert fit is not None, f"nothing was fitted to {device}"
    seed = hashlib.sha256(json.dumps(fit.numbers, sort_keys=True).encode()).hexdigest()
    dice = random.Random(seed)

    def differ(shape: LayerShape, tokens: int) -> bool:
        old, _, bold = choices(device, shape, tokens)
        return old.tiles != bold.tiles

    def count(low: int, high: int) -> int:
        return round(2 ** dice.uniform(math.log2(low), math.log2(high)))

    points = [("MiniMax-M3 EP8", M3, count(*span), True) for span in ((17, 63), (4300, 8000))]
    points += [("MiniMax-M3 EP8", M3, count(65, 4000), True), ("MiniMax-M3 EP8", M3, count(8300, 16384), True)]
    while len(points) < 12:  # three of M3 and five of other shapes, where the choices differ
        name = "MiniMax-M3 EP8" if len(points) < 7 else dice.choice(sorted(SHAPES))
        shape, tokens = SHAPES.get(name, M3), count(1, 16384)
        if differ(shape, tokens):
            points.append((name, shape, tokens, False))
    return points


def draw_counts(device: str, count: int) -> tuple[int, ...]:
    """So many different token counts of 1..16384, ascending, by the digest of the fit; none that a table has."""
    fit = fit_of(Target.SM90, device, *ASKED)
    assert fit is not None, f"nothing was fitted to {device}"
    dice = random.Random("full " + hashlib.sha256(json.dumps(fit.numbers, sort_keys=True).encode()).hexdigest())
    measured = {row.tokens for source in sources(Target.SM90, device, *ASKED, M3) for row in source.points}
    found = set[int]()
    while len(found) < count:
        found |= {round(2 ** dice.uniform(0, 14))} - measured
    return tuple(sorted(found))


def judge_full(device: str, count: int, seconds: float, workers: int, write: Callable[[dict[str, Any]], None]) -> None:
    """Search the whole space at drawn counts; ``write`` is called with the record after each.

    Args:
        device: the product.
        count: of token counts.
        seconds: for the timings; each count gets a part in proportion to what there is to try.
        workers: processes that compile.
        write: writes the record.
    """
    facts = Device(Target.SM90, device, torch.__version__, triton.__version__)
    counts = draw_counts(device, count)
    request = TuningRequest(facts, M3, (ASKED[0],), counts, TABLES, "tools.tile_choice")
    plans = [plan_of(request, TuningPoint(*ASKED, tokens)) for tokens in counts]
    begun = time.monotonic()
    tries = [candidates_of(request, plan) for plan in plans]
    kernels = distinct(candidate for each in tries for candidate in each)
    dropped = {candidate.code for candidate in unfit(kernels, workers, lambda done, of: None)}
    compiled = time.monotonic() - begun
    print(f"{len(kernels)} kernels in {compiled:.0f} s, {len(dropped)} won't do", flush=True)
    layer = Layer("MiniMax-M3 EP8", M3, SwiGLUOAI())
    brief = DeviceBench(layer, torch.device("cuda"), BRIEF)
    longer = DeviceBench(layer, torch.device("cuda"))
    longer.weights = brief.weights
    end, found = time.monotonic() + seconds, list[dict[str, Any]]()
    fitting = [
        without(plan, {(one.stage, one.block_m, one.tile) for one in each if one.code in dropped})
        for plan, each in zip(plans, tries, strict=True)
    ]
    fitting.sort(key=lambda plan: plan.steps)
    for index, plan in enumerate(fitting):
        if time.monotonic() > end:
            break
        share = plan.steps / sum(later.steps for later in fitting[index:])
        outcome = search(plan, brief, time.monotonic() + share * (end - time.monotonic()), time.monotonic)
        pair = [plan.before, outcome.tiles]
        times = [[longer.layer(plan.point, tiles).microseconds for tiles in pair] for _ in range(3)]
        today, best = (min(each[which] for each in times) for which in (0, 1))
        found.append(
            {
                "tokens": plan.point.tokens,
                "tiles": plan.before.key,
                "best": outcome.tiles.key,
                "us": round(today, 1),
                "best_us": round(best, 1),
                "over_best": round(today / min(today, best), 4),
                "stage_timings": plan.steps - outcome.untried,
                "untried": outcome.untried,
                "dropped": outcome.dropped,
            }
        )
        print(json.dumps(found[-1]), flush=True)
        write({"compiled_s": round(compiled, 1), "counts": counts, "kernels": len(kernels), "points": found})


def choices(device: str, shape: LayerShape, tokens: int) -> tuple[TileChoice, TileChoice, TileChoice]:
    """The nearest row's tiles, what calls take, and what they would take if the model overruled at half the margin."""
    kind = (Target.SM90, device, *ASKED, shape)
    fit = fit_of(*kind[:4])
    assert fit is not None, f"nothing was fitted to {device}"
    bold = fit.model_copy(update={"error": fit.error / 2, "error_other_shape": fit.error_other_shape / 2})
    calls = CallKind(ASKED[0], kind[0], shape, frozenset({ASKED[1]}), device_name=device)
    near = nearest_ranges(calls)
    all_ranges = near, tile_ranges(calls), overruled(near, sources(*kind), bold, kind[0], shape)
    found = [next(choice for first, choice in reversed(ranges) if first <= tokens) for ranges in all_ranges]
    return found[0], found[1], found[2]


def _launches(device: str, point: tuple[str, LayerShape, int, bool], all_tiles: list[LayerTiles]) -> tuple[Launch, ...]:
    _, shape, tokens, _ = point

    def call() -> None:
        form, kind = WeightFormat.FRAGMENT, {"device": "meta"}
        operands = layer_call(
            form,
            ExpertWeights.without_data(form, shape),
            torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, **kind),  # type: ignore[arg-type]
            torch.empty(tokens, shape.top_k, dtype=torch.float32, **kind),  # type: ignore[arg-type]
            torch.empty(tokens, shape.top_k, dtype=torch.int32, **kind),  # type: ignore[arg-type]
            ExpertMap.contiguous(shape.experts, shape.experts // shape.local_experts, 0),
        )
        for tiles in all_tiles:
            bind_layer(Path.W8A16, form, tiles, operands)()

    return launches_of(Target.SM90, call, device)


def main() -> None:
    """Draw, compile, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=110.0, help="begin no other timing after so long")
    parser.add_argument("--full", type=int, metavar="COUNT", help="drawn counts, with the whole space at each")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    arguments = parser.parse_args()
    begun = time.monotonic()
    device = torch.cuda.get_device_name()
    fit = fit_of(Target.SM90, device, *ASKED)
    assert fit is not None
    circumstances = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fit": fit_path(TABLES, Target.SM90).name,
    }

    def write(record: dict[str, Any]) -> None:
        write_atomic(arguments.file, json.dumps(circumstances | record, indent=1) + "\n")

    if arguments.full:
        command = {"command": f"python -m tools.tile_choice FILE --full {arguments.full}"}
        judge_full(device, arguments.full, arguments.seconds, arguments.workers, lambda each: write(command | each))
        return
    found: list[dict[str, Any]] = []
    tried: list[list[LayerTiles]] = []
    points = draw(device)
    for name, shape, tokens, every in points:
        old, new, bold = choices(device, shape, tokens)
        rows = rows_per_expert(tokens, shape)
        reach = candidates(fit, Target.SM90, shape).items()
        others = [tiles for tiles, (low, high) in reach if low / FAR <= rows <= high * FAR] if every else []
        tried.append(list(dict.fromkeys([old.tiles, new.tiles, bold.tiles, *others])))
        found.append(
            {
                "layer": name,
                "shape": asdict(shape),
                "tokens": tokens,
                "old": old.tiles.key,
                "new": new.tiles.key,
                "bold": bold.tiles.key,
                "new_is": new.source,
                "predicted_us": {
                    tiles.key: round(call_us(fit.times(), tiles, shape, tokens), 1) for tiles in tried[-1]
                },
                "us": {},
                "faults": {},
            }
        )
    wanted = missing(
        list(
            dict.fromkeys(
                launch for point, tiles in zip(points, tried, strict=True) for launch in _launches(device, point, tiles)
            )
        )
    )
    failed = [one.failure for one in compile_all(wanted, arguments.workers, lambda done: None) if one.failure]
    print(f"{len(wanted)} kernels in {time.monotonic() - begun:.0f} s, not compiled: {failed}", flush=True)
    bench, last = None, None
    order = sorted(range(len(points)), key=lambda index: (points[index][1] != M3, points[index][0]))
    for most in (2, 99):  # old and new everywhere first, then the other tiles
        for index in order:
            name, shape, tokens, _ = points[index]
            left = [tiles for tiles in tried[index][:most] if tiles.key not in found[index]["us"]]
            if not left or time.monotonic() - begun > arguments.seconds:
                continue
            if shape != last:
                bench, last = DeviceBench(Layer(name, shape, SwiGLUOAI()), torch.device("cuda")), shape
            assert bench is not None
            point = TuningPoint(*ASKED, tokens)
            for _ in range(2 if most == 2 else 1):  # in turn, twice
                for tiles in left:
                    if time.monotonic() - begun > arguments.seconds:
                        break
                    timed = bench.layer(point, tiles)
                    if timed.fault is None:
                        found[index]["us"].setdefault(tiles.key, []).append(round(timed.microseconds, 1))
                    else:
                        found[index]["faults"][tiles.key] = timed.fault
            times = {key: min(each) for key, each in found[index]["us"].items()}
            if {found[index]["old"], found[index]["new"]} <= times.keys():
                found[index]["new_over_old"] = round(times[found[index]["new"]] / times[found[index]["old"]], 4)
                found[index]["new_over_best"] = round(times[found[index]["new"]] / min(times.values()), 4)
            print(
                json.dumps({key: found[index][key] for key in found[index] if key not in ("shape", "new_is")}),
                flush=True,
            )
            write(
                {
                    "command": "python -m tools.tile_choice FILE",
                    "how": "whole calls in CUDA graphs by the tuner's bench, medians of 5 times 5 ms",
                    "seconds": round(time.monotonic() - begun, 1),
                    "points": found,
                }
            )


if __name__ == "__main__":
    main()
