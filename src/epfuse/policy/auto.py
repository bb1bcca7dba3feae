"""Policy `auto`: any supported target and shape, by memory, the tuned tables and the roofline.

The roofline's part is short. W8A16 makes the products of BF16 from half the bytes, and gives BF16's results: where both
can run it is never behind on paper. So MXFP8 is kept alone, unless measurements say that a BF16 copy is faster at some
token counts, and it fits.

Where somebody else's experts would run the layer, `rivals.py` says whether epfuse is known to be faster; if not, the
layer stays untouched.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from epfuse.config import Path, Policy
from epfuse.errors import ConfigError
from epfuse.families.family import CallKind
from epfuse.families.registry import READABLE
from epfuse.policy.call import call_table
from epfuse.policy.layer import LayerPlan, LayerRequest, Storage
from epfuse.policy.ranges import Route, token_ranges
from epfuse.policy.rivals import why_declined, why_taken
from epfuse.weights.checkpoint_format import Checkpoint

EXPERT_SHARE = 0.8
"""Part of a GPU's memory that experts may take; attention, activations and the KV cache need the rest."""
PAYS = 1.05
"""A BF16 copy pays where it is measured to be this many times faster than W8A16."""
GROUP = 32
"""Weights that share an MXFP8 scale."""
BLOCK = 128
"""Rows, and columns, of weights that share a block FP8 scale."""


@dataclass(frozen=True)
class Gain:
    """Token counts at which BF16 is measured to be faster.

    Attributes:
        min_tokens: from here.
        max_tokens: to here; None for no end.
        times: how many times faster it is at ``min_tokens``.
    """

    min_tokens: int
    max_tokens: int | None
    times: float


def plan(request: LayerRequest) -> LayerPlan:
    """What `auto` does with one layer.

    Args:
        request: the layer.

    Raises:
        ConfigError: nothing that the checkpoint can become fits, or ``request.stored`` is UNTOUCHED.
        UnsupportedTarget: what is stored has no kernel on the target.
    """
    if request.stored is Storage.UNTOUCHED:
        raise ConfigError("stored is 'untouched'; policy auto plans layers whose weights epfuse keeps")
    gains = _gains(request.calls(Storage.HYBRID))
    storage, reason, refused = _storage(request, gains)
    ranges = token_ranges(request, storage, _routes(storage, request, gains))
    found = LayerPlan(Policy.AUTO, request, storage, reason, ranges, refused)
    if found.why_portable is not None:
        found = replace(found, reason=f"{reason} The portable kernels run it: {found.why_portable}")
    declined = why_declined(found)
    if declined is not None:
        return LayerPlan(Policy.AUTO, request, Storage.UNTOUCHED, declined)
    evidence = why_taken(found)
    return found if evidence is None else replace(found, reason=f"{found.reason} {evidence}")


Refused = tuple[tuple[Storage, str], ...]


def _storage(request: LayerRequest, gains: tuple[Gain, ...]) -> tuple[Storage, str, Refused]:
    """What the layer keeps, why, and why nothing else."""
    if request.stored is not None:
        others = [storage for storage in _STORAGES if storage is not request.stored]
        return request.stored, "It is what is stored.", tuple((other, "Something else is stored.") for other in others)
    if request.checkpoint is Checkpoint.BF16:
        rounds = "MXFP8 would round the checkpoint's BF16 weights."
        _require(Storage.BF16, request)
        return (
            Storage.BF16,
            "The checkpoint has BF16 weights, and they fit.",
            ((Storage.MXFP8, rounds), (Storage.HYBRID, rounds)),
        )
    if request.checkpoint is Checkpoint.BLOCK_FP8:
        return _block_fp8(request)
    if request.shape.hidden % GROUP or request.shape.intermediate % GROUP:
        sizes = f"H={request.shape.hidden} and I={request.shape.intermediate}; MXFP8 needs multiples of {GROUP}."
        _require(Storage.BF16, request)
        return Storage.BF16, sizes, ((Storage.MXFP8, sizes), (Storage.HYBRID, sizes))
    _require(Storage.MXFP8, request)
    bf16 = (Storage.BF16, "It takes twice the bytes of MXFP8, in memory and in every step, for the same results.")
    if not gains:
        copy = "No measurement says that a BF16 copy is faster at any token count."
        return (
            Storage.MXFP8,
            "It holds the checkpoint's weights exactly, in half of BF16's bytes.",
            (bf16, (Storage.HYBRID, copy)),
        )
    best = max(gains, key=lambda gain: gain.times)
    faster = f"From {best.min_tokens} tokens a BF16 copy is measured {best.times:.2f} times as fast"
    copies = _copies_that_fit(request)
    if request.moe_layers.index(request.layer) < copies:
        return Storage.HYBRID, f"{faster}, and it fits.", (bf16, (Storage.MXFP8, f"{faster}, and it fits."))
    reason = f"{faster}, but no more than {copies} of {len(request.moe_layers)} layers have room for one."
    return Storage.MXFP8, reason, (bf16, (Storage.HYBRID, reason))


def _block_fp8(request: LayerRequest) -> tuple[Storage, str, Refused]:
    """What a checkpoint with a scale per block of weights becomes."""
    rounds = "MXFP8's scales are powers of two; it would round the checkpoint's weights again."
    others = ((Storage.MXFP8, rounds), (Storage.HYBRID, rounds))
    if request.shape.intermediate % BLOCK:
        sizes = f"I={request.shape.intermediate}; the blocks of gate and up lie apart only at multiples of {BLOCK}."
        _require(Storage.BF16, request)
        return Storage.BF16, sizes, ((Storage.BLOCK_FP8, sizes), *others)
    _require(Storage.BLOCK_FP8, request)
    twice = "It takes twice the bytes of block FP8, in memory and in every step."
    return Storage.BLOCK_FP8, "It is what the checkpoint has.", ((Storage.BF16, twice), *others)


_STORAGES = (Storage.BF16, Storage.MXFP8, Storage.HYBRID)


def expert_budget(hbm_bytes: int) -> int:
    """Bytes that experts may take of a GPU's memory."""
    return int(EXPERT_SHARE * hbm_bytes)


def _require(storage: Storage, request: LayerRequest) -> None:
    """Refuse what does not fit."""
    if request.hbm_bytes is None:
        return
    needed = request.bytes_of(storage) * len(request.moe_layers)
    budget = expert_budget(request.hbm_bytes)
    if needed > budget:
        raise ConfigError(
            f"the experts take {needed / 1e9:.1f} GB a rank as {storage.value}; they may take {budget / 1e9:.1f} GB,"
            f" {EXPERT_SHARE:.0%} of the {request.hbm_bytes / 1e9:.1f} GB that there are: more ranks are needed"
        )


def _copies_that_fit(request: LayerRequest) -> int:
    """How many layers have room for a BF16 copy beside everyone's MXFP8."""
    layers = len(request.moe_layers)
    if request.hbm_bytes is None:
        return layers
    free = expert_budget(request.hbm_bytes) - layers * request.bytes_of(Storage.MXFP8)
    return min(layers, free // request.bytes_of(Storage.BF16))


@functools.lru_cache(maxsize=1024)  # a model's layers are alike
def _gains(kind: CallKind) -> tuple[Gain, ...]:
    """Where BF16 is measured to be faster than W8A16 by enough; nothing where one of the two is not measured."""
    if not kind.target.is_gpu:
        return ()
    bf16, w8a16 = (call_table(replace(kind, path=path)) for path in (Path.BF16, Path.W8A16))
    starts = sorted({*bf16.first_tokens, *w8a16.first_tokens})
    found = []
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        of_bf16, of_w8a16 = bf16.at(start).measured_us, w8a16.at(start).measured_us
        if of_bf16 is not None and of_w8a16 is not None and of_w8a16 >= PAYS * of_bf16:
            found.append(Gain(start, None if after is None else after - 1, of_w8a16 / of_bf16))
    return tuple(found)


def _routes(storage: Storage, request: LayerRequest, gains: tuple[Gain, ...]) -> list[Route]:
    """The paths of a storage by token count."""
    if storage is Storage.BF16:
        return [Route(None, Path.BF16, "It is what reads BF16 weights.")]
    if storage is Storage.BLOCK_FP8 and Path.BLOCK_FP8 not in READABLE[request.target]:
        return [Route(None, Path.W8A16, "It reads block FP8 here, and rounds no activation to FP8.")]
    if storage is Storage.BLOCK_FP8:
        reason = "It is what reads block FP8; activations are quantised per 128 values, as such models are trained."
        return [Route(None, Path.BLOCK_FP8, reason)]
    exact = Route(None, Path.W8A16, "It makes BF16's products from half the bytes and rounds no activation to FP8.")
    if storage is Storage.MXFP8:
        return [exact]
    routes = []
    first = 1
    for gain in gains:
        if gain.min_tokens > first:
            routes.append(replace(exact, max_tokens=gain.min_tokens - 1))
        reason = f"It is measured {gain.times:.2f} times as fast as W8A16."
        routes.append(Route(gain.max_tokens, Path.BF16, reason, "BF16 is measured to be faster here."))
        if gain.max_tokens is None:
            return routes
        first = gain.max_tokens + 1
    return [*routes, exact]
