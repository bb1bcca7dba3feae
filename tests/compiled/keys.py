"""What Triton would compile for calls of a layer, in a process that doesn't interpret (`test_layer.py`)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import JITCallable

from epfuse.aot.launches import Launch, launches_of
from epfuse.api import fused_experts
from epfuse.compiled.layer import kernels
from epfuse.config import MINIMAX_M3_EP8, Bias, Combine, LayerShape, Path, SwiGLUOAI, WeightFormat
from epfuse.expert_map import ExpertMap
from epfuse.families.family import CallKind
from epfuse.families.registry import scratch_size
from epfuse.kernel_keys import settle_key
from epfuse.scratch import Scratch
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights

SHAPE = LayerShape(hidden=256, intermediate=128, experts=16, local_experts=4, top_k=3)
"""Small: operands lie in real memory, which is not touched. Rows of ids and router weights are 12 bytes."""
MOST = 3000

LAYERS = {
    f"{target.value}-{path.value}-{combine.value}": CallKind(path, target, SHAPE, frozenset({form}), combine=combine)
    for target, path, form, combine in [
        (Target.SM90, Path.W8A16, WeightFormat.FRAGMENT, Combine.DETERMINISTIC),
        (Target.SM90, Path.BF16, WeightFormat.DENSE, Combine.DETERMINISTIC),
        (Target.SM90, Path.W8A8, WeightFormat.ROW_FP8, Combine.DETERMINISTIC),
        (Target.SM90, Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, Combine.DETERMINISTIC),
        (Target.SM90, Path.BLOCK_FP8, WeightFormat.BLOCK_FP8, Combine.ATOMIC),
        (Target.GFX942, Path.W8A16, WeightFormat.MXFP8_FNUZ, Combine.DETERMINISTIC),
        (Target.GFX942, Path.BF16, WeightFormat.DENSE, Combine.DETERMINISTIC),
        (Target.GFX942, Path.W8A8, WeightFormat.MXFP8_FNUZ, Combine.ATOMIC),
        (Target.GFX942, Path.W8A8, WeightFormat.MXFP8_FNUZ, Combine.DETERMINISTIC),
    ]
}


def with_biases(name: str) -> str:
    """The name of a layer, and biases."""
    return f"{name}-biases"


LAYERS |= {
    with_biases(name): replace(LAYERS[name], bias=Bias.ADDED)
    for name in ("sm_90-w8a16-deterministic", "sm_90-bf16-deterministic", "sm_90-w8a8-deterministic")
}
LAYERS["sm_90-w8a8-whole-pairs"] = replace(  # of steps of 128: sizes that sm90_fp8_rows takes
    LAYERS["sm_90-w8a8-deterministic"], shape=replace(SHAPE, intermediate=256)
)


class Memory:
    """Views of one untouched piece of memory, larger than AMD's instructions can address, at any offset."""

    def __init__(self, draw: random.Random) -> None:
        self.memory = torch.empty(5 << 29, dtype=torch.uint8)
        self.draw = draw
        self.used = 0

    def take(self, *size: int, dtype: torch.dtype, aligned: bool = False) -> torch.Tensor:
        """A contiguous tensor; not at a multiple of 16 bytes, half of the time, unless it must be."""
        item = dtype.itemsize
        begin = -(-self.used // 16) * 16
        if not aligned and self.draw.random() < 0.5:
            begin += item * self.draw.randrange(16 // item)
        self.used = begin + item * torch.Size(size).numel()
        return self.memory[begin : self.used].view(dtype).view(size)


def calls(layer: CallKind, seed: int, count: int) -> list[Launch]:
    """What `drawn` calls launch."""
    return launches_of(layer.target, drawn(layer, seed, count, MOST), layer.device, stand_in="cpu")


def drawn(layer: CallKind, seed: int, count: int, most: int) -> Callable[[], None]:
    """``count`` calls that differ in all that may differ between the calls of a layer."""
    draw = random.Random(seed)
    shape = layer.shape
    made = ExpertWeights.without_data(next(iter(layer.formats)), shape, layer.dtype, bias=layer.bias)
    biases = {name: torch.empty(bias.shape) for name, bias in made.biases}
    weights = ExpertWeights(tuple(_real(experts) for experts in made.formats), **biases)
    slots = torch.arange(shape.experts)
    expert_map = ExpertMap(torch.where(slots < shape.local_experts, slots, -1))

    def call() -> None:
        for _ in range(count):
            memory = Memory(draw)
            tokens = draw.choice([draw.randint(1, least) for least in (min(8, most), min(600, most), most)])
            hidden = memory.take(tokens, shape.hidden, dtype=layer.dtype)
            scratch = out = None
            kind = draw.randrange(4)
            if kind >= 2:
                size = scratch_size(layer.path, tokens, shape.top_k, shape.hidden, shape.intermediate)
                y, routed = (memory.take(n, dtype=layer.dtype, aligned=True) for n in (size.y, size.routed))
                scratch = Scratch(y, routed)
                if kind == 3 and size.y >= hidden.numel():  # as vLLM lays it
                    out = y[: hidden.numel()].view(hidden.shape)
            if kind == 1:
                out = memory.take(tokens, shape.hidden, dtype=layer.dtype)
            fused_experts(
                hidden if tokens > 1 else hidden.as_strided((1, shape.hidden), (1, 1)),  # contiguous all the same
                weights,
                memory.take(tokens, shape.top_k, dtype=torch.float32),
                memory.take(tokens, shape.top_k, dtype=torch.int32),
                expert_map,
                activation=draw.choice([SwiGLUOAI(), SwiGLUOAI(1, 0, 10), SwiGLUOAI(1.0, 16.0, float("inf"))]),
                path=layer.path,
                combine=layer.combine,
                out=out,
                scratch=scratch,
            )

    return call


def _real(experts):
    """The same stacks in memory that is never touched."""
    _, hidden, intermediate = experts.sizes
    tensors = [torch.empty(tensor.shape, dtype=tensor.dtype) for _, tensor in experts.tensors()]
    return type(experts).rebuilt(tensors, hidden, intermediate)


def compare(name: str, seed: int, count: int, top_k: int = SHAPE.top_k) -> tuple[list[str], list[str], dict[str, int]]:
    """Kernels of drawn calls that the layer's set does not have, `several`, and how many of each name it has."""
    layer = replace(LAYERS[name], shape=replace(LAYERS[name].shape, top_k=top_k))
    named = kernels(layer, MOST)
    strangers = [launch for launch in calls(layer, seed, count) if launch not in set(named)]
    counts: dict[str, int] = {}
    for launch in named:
        counts[launch.kernel] = counts.get(launch.kernel, 0) + 1
    return [f"{launch.kernel}: {_closest(launch, named)}" for launch in strangers], several(named), counts


def several(named: tuple[Launch, ...]) -> list[str]:
    """Kernels that share kernel and constants, but not the key."""
    seen: dict[object, Launch] = {}
    found = []
    for launch in named:
        constants = (launch.kernel, launch.constants, launch.options)
        if constants in seen:
            found.append(f"{launch.kernel}: {_closest(launch, (seen[constants],))}")
        seen[constants] = launch
    return found


def _closest(launch: Launch, named: tuple[Launch, ...]) -> str:
    """What sets a launch apart from the most similar one of its kernel."""

    def apart(other: Launch) -> list[object]:
        pairs = ((launch.signature, other.signature), (launch.constants, other.constants))
        return [
            item
            for ours, theirs in (*pairs, (launch.attributes, other.attributes), (launch.options, other.options))
            for item in {*map(repr, ours)} ^ {*map(repr, theirs)}
        ]

    differences = [apart(other) for other in named if other.kernel == launch.kernel]
    return str(min(differences, key=len, default="no such kernel"))


def of_large_calls() -> list[dict[str, int]]:
    """Kernels of the largest tile of MiniMax-M3 in checkpoint order, on Hopper and on AMD, for 8k and 128k tokens."""
    found = []
    for target, form in ((Target.SM90, WeightFormat.MXFP8), (Target.GFX942, WeightFormat.MXFP8_FNUZ)):
        layer = CallKind(Path.W8A16, target, MINIMAX_M3_EP8, frozenset({form}))
        tile = [
            launch
            for launch in kernels(layer, 131072)
            if launch.kernel in ("gate_up_kernel", "down_kernel", "combine_kernel")
            and dict(launch.constants).get("BLOCK_M", 128) >= 128
            and dict(launch.constants).get("BLOCK_H", 2048) == 2048
        ]
        found.append({name: sum(launch.kernel == name for launch in tile) for name in {one.kernel for one in tile}})
    return found


def chunks_of(target: Target, max_tokens: int) -> dict[str, set[int]]:
    """How routes of MiniMax-M3 are cut by each of the two launches that calls of many have."""
    found: dict[str, set[int]] = {"count_kernel": set(), "place_kernel": set()}
    layer = CallKind(Path.BF16, target, MINIMAX_M3_EP8, frozenset({WeightFormat.DENSE}))
    for launch in kernels(layer, max_tokens):
        if launch.kernel in found:
            found[launch.kernel].add(dict(launch.constants)["CHUNK"])
    return found


def by_order() -> list[dict[str, str]]:
    """Triton's hash of every kernel of `LAYERS`, after those before it in one order, in the other, and after none."""
    named = {launch.kernel: launch.function() for layer in LAYERS.values() for launch in kernels(layer, MOST)}
    alone = {name: hashes for name in named for hashes in _hashes({name: named[name]}, [name]).values()}
    return [_hashes(named, [*named]), _hashes(named, [*named][::-1]), alone]


def _hashes(named: dict[str, Any], order: Sequence[str]) -> dict[str, str]:
    """Of kernels in a process that looks for them in this order."""
    for module in [module for name, module in sys.modules.items() if name.startswith("epfuse.")]:
        for function in vars(module).values():
            if isinstance(function, JITCallable):
                function.hash, function.used_global_vals = None, {}
    for name in order:
        settle_key(named[name])
    return {name: str(named[name].cache_key) for name in sorted(order)}
