"""Hash the bits of results, for every path over layers and token counts: does a change of the code change a result?

    PYTHONPATH=src python3 -m tools.output_bits bits.json
    PYTHONPATH=src python3 -m tools.output_bits bits.json --compare before.json

Inputs are drawn on the device by a seed, so records of one kind of device and one version of torch can be compared.
`tools.host_time` measures the host's time of a call.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pathlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import click
import torch

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI, Target, fused_experts
from epfuse.bench.machine import describe_device, run_facts
from epfuse.children import Children, join
from epfuse.config import LayerShape, silu_gate
from epfuse.report.write import write_atomic
from epfuse.target import target_of

TOKENS = (1, 2, 5, 16, 37, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CPU_TOKENS = (1, 5, 37)
LAYERS = {
    "minimax-m3-ep8": (LayerShape(6144, 3072, 128, 16, 4), SwiGLUOAI()),
    "minimax-m3-tp8": (LayerShape(6144, 384, 128, 128, 4), SwiGLUOAI()),
    "gpt-oss-20b": (LayerShape(2880, 2880, 32, 32, 4), SwiGLUOAI()),
    "qwen3-235b-ep8": (LayerShape(4096, 1536, 128, 16, 8), silu_gate()),
    "small": (LayerShape(512, 256, 16, 4, 4), SwiGLUOAI()),
}
KINDS = ("bf16", "fp16", "w8a16", "w8a16 as stored", "w8a8", "w8a8 as stored", "block_fp8")


def weights_of(kind: str, shape: LayerShape, device: torch.device) -> tuple[ExpertWeights, Path]:
    """Seeded weights as ``kind`` wants them, and its path."""
    g = torch.Generator(device).manual_seed(7)
    local, tensors = shape.local_experts, []
    for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        codes = torch.randint(0, 120, (local, rows, columns), dtype=torch.uint8, device=device, generator=g)
        codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, device=device, generator=g) * 128
        scales = torch.randint(112, 118, (local, rows, columns // 32), dtype=torch.uint8, device=device, generator=g)
        tensors += [codes.view(torch.float8_e4m3fn), scales]
    if kind in ("bf16", "fp16"):
        dense = ExpertWeights.hybrid(*tensors).dense_experts
        assert dense is not None
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return ExpertWeights.dense(dense.w13.to(dtype), dense.w2.to(dtype)), Path.BF16
    if kind == "block_fp8":
        weights = ExpertWeights.block_fp8(*tensors)
        return (weights.prepare() if target_of(device) is Target.GFX942 else weights), Path.BLOCK_FP8
    stored = ExpertWeights.mxfp8(*tensors)
    path = Path.W8A16 if kind.startswith("w8a16") else Path.W8A8
    return (stored if kind.endswith("as stored") else stored.prepare(path=path)), path


def bits_of(layer: str, kind: str, device_name: str) -> dict[str, Any]:
    """Name of each case -> the hash of its result; and the host's time of a call."""
    device = torch.device(device_name)
    shape, activation = LAYERS[layer]
    weights, path = weights_of(kind, shape, device)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    expert_map = ExpertMap.contiguous(shape.experts, shape.experts // shape.local_experts, 0, device)
    found: dict[str, Any] = {}

    path = path if device.type == "cuda" else Path.REFERENCE
    for tokens in TOKENS if device.type == "cuda" else CPU_TOKENS:
        g = torch.Generator(device).manual_seed(tokens)
        hidden = torch.randn(tokens, shape.hidden, device=device, generator=g).to(dtype)
        topk_weights, ids = torch.rand(tokens, shape.experts, device=device, generator=g).topk(shape.top_k)
        result = fused_experts(hidden, weights, topk_weights, ids.int(), expert_map, activation=activation, path=path)
        found[f"{layer}/{kind}/{tokens}"] = hashlib.sha256(
            result.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        ).hexdigest()[:24]
    return found


@click.command(help=__doc__)
@click.argument("record", type=click.Path(path_type=pathlib.Path))
@click.option(
    "--compare", "before", type=click.Path(exists=True, path_type=pathlib.Path), help="Record of another version."
)
@click.option("--jobs", type=click.IntRange(1, 32), default=12, show_default=True, help="Processes side by side.")
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="Paths and formats.")
def main(record: pathlib.Path, before: pathlib.Path | None, jobs: int, kinds: str) -> None:
    """Write the record; exit with 1 where it differs from the one before."""
    asked = kinds.split(",")
    if unknown := set(asked) - set(KINDS):
        raise click.UsageError(f"--kinds has {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    old = json.loads(before.read_text()) if before else None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    layers = list(LAYERS) if device.type == "cuda" else ["small"]
    bits: dict[str, str] = {}
    refused: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    with Children() as children, ProcessPoolExecutor(jobs, spawn, initializer=join, initargs=(children.id,)) as pool:
        waiting = {
            pool.submit(bits_of, layer, kind, str(device)): f"{layer}/{kind}" for layer in layers for kind in asked
        }
        for done in as_completed(waiting):
            try:
                bits |= done.result()
            except Exception as error:  # a kind that a layer's sizes don't allow is on record, like its reason
                refused[waiting[done]] = f"{type(error).__name__}: {error}".splitlines()[0]
    results = {"refused": dict(sorted(refused.items())), "bits": dict(sorted(bits.items()))}
    found = run_facts(["python", "-m", "tools.output_bits"], device=describe_device(device), **results)
    write_atomic(record, json.dumps(found, indent=1) + "\n")
    click.echo(f"{len(bits)} results")
    for name, reason in found["refused"].items():
        click.echo(f"  refused {name}: {reason}")
    if old is None:
        return
    differ = sorted(name for name in bits.keys() | old["bits"].keys() if bits.get(name) != old["bits"].get(name))
    click.echo(f"against {old['commit']}: {len(differ)} differ")
    for name in differ:
        click.echo(f"  {name}: {old['bits'].get(name)} -> {bits.get(name)}")
    if differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
