"""Whoever takes part in a benchmark: a path of this package, or a peer."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from epfuse.api import fused_experts
from epfuse.arguments import checks_enums
from epfuse.bench.amounts import Text
from epfuse.bench.inputs import Inputs
from epfuse.bench.layers import Layer
from epfuse.bench.measure import Call, TimingMethod
from epfuse.bench.roofline import MatrixOperand
from epfuse.bench.weights import LayerWeights
from epfuse.config import Combine, Path, WeightFormat
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import FP8_PATHS, CallKind, decide
from epfuse.target import device_name
from epfuse.verify.budget import Tolerance, dense_tolerance, fp8_tolerance
from epfuse.verify.problem import Problem
from epfuse.verify.subject import Subject, subjects_of
from epfuse.verify.suite import TRUE_SIZE_LIMITS

PEER_TOLERANCE = Tolerance(snr_db=-math.inf, max_error=math.inf, relative_error=2e-2)
"""Peers round to BF16 where they like: some after every elementwise operation, which is some 15 roundings and 5e-3. A
result that lacks the clamp, or one route of a token, is far beyond 2e-2."""


class ContenderKind(enum.Enum):
    """Whose code it is."""

    PATH = "path"
    PEER = "peer"


@checks_enums
@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        name: with ``weights`` it identifies the contender in a record.
        kind: ours or not.
        weights: how its weights lie in memory.
        form: the format whose bytes are its floor.
        operand: what its matrix instructions multiply, the other part of its floor.
        tolerance: what its results must reach.
        method: how it can be timed.
        bind: prepares a call on given inputs; the call does the whole layer, from ids to the sum over local routes.
        note: what it does, for a reader who compares.
        block_m: T -> rows that its GEMMs pad each expert's to a multiple of; None if that is not known.
    """

    name: str
    kind: ContenderKind
    weights: str
    form: WeightFormat
    operand: MatrixOperand
    tolerance: Tolerance
    method: TimingMethod
    bind: Callable[[Inputs], Call]
    note: str = ""
    block_m: Callable[[int], int | None] = lambda tokens: None


@dataclass(frozen=True)
class Absent:
    """A peer that does not take part.

    Attributes:
        name: as of a contender.
        reason: why not.
    """

    name: Text
    reason: str


def problem_of(layer: Layer, tokens: tuple[int, ...], device: torch.device, seed: int) -> Problem:
    """The layer as the correctness suite knows it, in bfloat16.

    Args:
        layer: its sizes, ranks, activation and biases.
        tokens: T of each point.
        device: where it runs.
        seed: of weights, activations and routings.
    """
    shape = layer.shape
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.top_k, layer.ep_size)
    return Problem(*sizes, tokens, torch.bfloat16, device, seed, layer.activation, layer.bias)


def paths_of(problem: Problem, choice: tuple[str, ...], weights: LayerWeights) -> list[Contender]:
    """The paths that were asked for; arguments and errors as of `chosen_subjects`.

    Args:
        problem: sizes, device.
        choice: names of paths.
        weights: where contenders get theirs; nothing is made before a contender is bound.
    """
    return [_path(subject, problem, weights) for subject in chosen_subjects(problem, choice)]


def chosen_subjects(problem: Problem, choice: tuple[str, ...]) -> list[Subject]:
    """The paths that were asked for, each on weights that it reads.

    Args:
        problem: sizes, device.
        choice: names of paths; ``auto`` for what the policy chooses for each kind of weights; ``all`` for every path,
            in every format that it reads, with every way to sum routes, and the reference. Empty: each path that has
            a kernel, on the weights that it reads best; where there is none, the reference.

    Raises:
        ConfigError, UnsupportedTarget: no such path, or not on this device or these sizes.
    """
    if not choice:
        return each_path_once(problem)
    found: list[Subject] = []
    for name in choice:
        subjects = subjects_of(problem, name)
        found += subjects if name in ("all", Path.AUTO.value) else subjects[:1]
    return list(dict.fromkeys(found))


def each_path_once(problem: Problem) -> list[Subject]:
    """Each path that has a kernel here, on the weights that it reads best; where there is none, the reference."""
    found = []
    for path in Path:
        if path in (Path.AUTO, Path.REFERENCE):
            continue
        try:
            found.append(subjects_of(problem, path.value)[0])
        except (UnsupportedTarget, ConfigError):  # not on this device, or sizes that MXFP8 can't have
            continue
    return found or [subjects_of(problem, Path.REFERENCE.value)[0]]


def _path(subject: Subject, problem: Problem, weights: LayerWeights) -> Contender:
    path, combine = subject.path, subject.combine
    operand = (
        MatrixOperand.FP32 if path is Path.REFERENCE else MatrixOperand.FP8 if path in FP8_PATHS else MatrixOperand.BF16
    )

    def bind(inputs: Inputs) -> Call:
        experts = weights.in_format(subject.form)
        out = torch.empty_like(inputs.hidden)

        def call() -> torch.Tensor:
            return fused_experts(
                inputs.hidden,
                experts,
                inputs.topk_weights,
                inputs.topk_ids,
                inputs.expert_map,
                activation=weights.layer.activation,
                path=path,
                combine=combine,
                out=out,
            )

        return call

    def block_m(tokens: int) -> int | None:
        forms, product = frozenset({subject.form}), device_name(problem.device)
        layer = (path, problem.target, problem.shape, forms, problem.dtype, combine)
        kind = CallKind(*layer, type(problem.activation), problem.bias, product)
        tiles = decide(kind, tokens).tiles
        return tiles.block_m if tiles else None

    captured = problem.target.is_gpu and path is not Path.REFERENCE  # which syncs with the device
    return Contender(
        name=path.value if combine is Combine.DETERMINISTIC else f"{path.value} {combine.value}",
        kind=ContenderKind.PATH,
        weights=subject.form.value,
        form=subject.form,
        operand=operand,
        tolerance=_tolerance(path, problem),
        method=TimingMethod.GRAPH if captured else TimingMethod.PLAIN,
        bind=bind,
        block_m=block_m,
    )


def _tolerance(path: Path, problem: Problem) -> Tolerance:
    """As `verify` has it."""
    if path in FP8_PATHS:
        tolerance = fp8_tolerance()
    else:
        tolerance = dense_tolerance(torch.bfloat16, problem.hidden, problem.intermediate)
    limit = TRUE_SIZE_LIMITS.get(path) if problem.has_true_size else None
    return tolerance if limit is None else replace(tolerance, relative_error=limit)
