"""The demo from start to end: untouched model, ranks, comparison, record."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from epfuse import __version__
from epfuse.config import LayerShape, WeightFormat
from epfuse.demo.checks import judge
from epfuse.demo.model import build_model, round_experts_to_mxfp8, seed_weights
from epfuse.demo.padding import globally_aligned_rows, planned_block_m
from epfuse.demo.progress import StepBar
from epfuse.demo.rank import RANK_STEPS, RankJob, run_rank
from epfuse.demo.record import DemoRecord, LayerRecord, LogitsRecord, RankRecord
from epfuse.demo.settings import DemoSettings
from epfuse.demo.text import Text, decode, encode
from epfuse.demo.true_size import run_true_size
from epfuse.demo.untouched import Untouched, run_untouched, save_untouched
from epfuse.integrations.transformers import replace_experts
from epfuse.parallel.group import EPGroup
from epfuse.parallel.launch import Placement, launch_ranks
from epfuse.parallel.limits import check_limits
from epfuse.target import target_of
from epfuse.weights.checkpoint import save_checkpoint

LAUNCHER_STEPS = 3
"""Steps that the launcher itself reports: the untouched model, the ranks' start, the true-size layer."""


def run_demo(settings: DemoSettings, text: Text) -> DemoRecord:
    """Run the demo with a progress bar on stderr.

    The launcher runs the untouched model and writes its weights to a temporary file, from which each rank reads its own
    experts and nothing of the others'.

    Args:
        settings: sizes, ranks, dtype, seed.
        text: what the model reads.

    Returns:
        The record, checks judged.

    Raises:
        ConfigError: this machine's limits don't allow so many ranks.
        RankFailed: a rank raised, died or held the others.
    """
    check_limits(settings.ranks)
    placement = Placement.choose(settings.ranks)
    device = placement.device(0)
    target = target_of(device)
    seconds: dict[str, float] = {}
    with StepBar(LAUNCHER_STEPS + RANK_STEPS * settings.ranks) as bar, tempfile.TemporaryDirectory() as folder:
        bar.next("untouched model")
        with _timed(seconds, "untouched model"), _one_thread():
            model = build_model(settings.size, settings.torch_dtype, device)
            seed_weights(model, settings.seed)
            if settings.weights is WeightFormat.MXFP8:
                round_experts_to_mxfp8(model)
            prompt = torch.tensor(encode(text.data, settings.tokens), device=device)
            untouched = run_untouched(model, prompt, settings.new_tokens)
        bar.done()

        bar.next(f"{settings.ranks} ranks, {placement.backend}")
        with _timed(seconds, "ranks"):
            job = _write_job(Path(folder), settings, model, untouched, _block_m(settings, device, untouched))
            with bar.following(job.step_dir):
                ranks = launch_ranks(
                    run_rank,
                    (job,),
                    ranks=settings.ranks,
                    placement=placement,
                    log_dir=Path(folder),
                    preload=("epfuse.demo.rank",),
                )
        bar.done()

        true_size = None
        if target.is_gpu:
            bar.next("one layer at true size")
            with _timed(seconds, "true size"):
                true_size = run_true_size(device, settings.seed, settings.weights)
        bar.done()

    layers = [layer_record(name, untouched, ranks, settings.size.experts) for name in untouched.layers]
    logits = LogitsRecord(
        max_abs=max(rank.logits_max for rank in ranks),
        rms=max(rank.logits_rms for rank in ranks),
        noise=untouched.logits_noise,
        scale=untouched.logits_scale,
    )
    return DemoRecord(
        settings={
            "ranks": settings.ranks,
            "tokens": settings.tokens,
            "new_tokens": settings.new_tokens,
            "dtype": settings.dtype,
            "weights": settings.weights.value,
            "seed": settings.seed,
            "size": vars(settings.size),
        },
        environment={
            "epfuse": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "target": target.value,
            "placement": placement.value,
            "backend": placement.backend,
        },
        text={
            "source": text.source,
            "tokens": untouched.prompt.numel(),
            "untouched_tokens": untouched.tokens,
            "tokens_by_ranks": ranks[0].tokens,
            "untouched_text": decode(untouched.tokens),
        },
        block_m=job.block_m,
        layers=layers,
        logits=logits,
        ranks=ranks,
        true_size=true_size,
        checks=judge(layers, logits, ranks, untouched.tokens, settings.dtype, true_size),
        seconds=seconds,
    )


def layer_record(name: str, untouched: Untouched, ranks: list[RankRecord], experts: int) -> LayerRecord:
    """One layer's record from every rank's view of it; distances are the worst rank's, NaN being the worst of all."""
    trace = untouched.layers[name]
    views = [rank.layers[name] for rank in ranks]
    return LayerRecord(
        name=name,
        routes=trace.topk_ids.numel(),
        useful_rows=[view.useful_rows for view in views],
        padded_rows=[view.padded_rows for view in views],
        global_rows=globally_aligned_rows(trace.topk_ids, experts),
        error=_worst([view.error for view in views]),
        unsharded_distance=_worst([view.unsharded_distance for view in views]),
        transformers_error=trace.transformers_error,
        clamped=trace.clamped,
    )


def _write_job(
    folder: Path, settings: DemoSettings, model: torch.nn.Module, untouched: Untouched, block_m: int
) -> RankJob:
    job = RankJob(settings, block_m, folder / "model.safetensors", folder / "untouched.safetensors", folder / "steps")
    job.step_dir.mkdir()
    if settings.weights is WeightFormat.MXFP8:  # of numbers that MXFP8 holds: nothing is rounded here
        replace_experts(model, EPGroup.single(), form=WeightFormat.MXFP8)
    save_checkpoint(model, job.checkpoint)
    save_untouched(untouched, job.untouched)
    return job


def _block_m(settings: DemoSettings, device: torch.device, untouched: Untouched) -> int:
    size = settings.size
    shape = LayerShape(size.hidden, size.intermediate, size.experts, size.experts // settings.ranks, size.top_k)
    return planned_block_m(device, shape, untouched.prompt.numel(), settings.weights)


def _worst(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).max())


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is too small to gain from threads, and their spinning costs seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
