"""What is verified: the paths, grouped by the weights that a checkpoint would hold for them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Combine, Path, WeightFormat
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.numerics.mxfp8 import BLOCK
from epfuse.policy import FP8_PATHS, READABLE, CallKind, decide
from epfuse.target import device_name
from epfuse.verify.problem import Problem


class Stored(enum.Enum):
    """The weights that a run starts from, and that its oracles compute with."""

    DENSE = "dense"
    """In the problem's dtype."""
    MXFP8 = "mxfp8"
    """The same, quantised."""


@checks_enums
@dataclass(frozen=True)
class Subject:
    """One way to compute the layer.

    Attributes:
        path: never AUTO.
        stored: what its weights are made from.
        form: the format that it reads.
        combine: how it sums routes.
    """

    path: Path
    stored: Stored
    form: WeightFormat
    combine: Combine = Combine.DETERMINISTIC


_NATURAL = {
    Path.REFERENCE: (WeightFormat.DENSE, WeightFormat.MXFP8),
    Path.BF16: (WeightFormat.DENSE,),
    Path.W8A16: (WeightFormat.MXFP8,),
    Path.W8A8: (WeightFormat.MXFP8,),
    Path.BLOCK_FP8: (WeightFormat.BLOCK_FP8,),
}
"""The weights that each path takes, on a target that lists none."""


def subjects_of(problem: Problem, choice: str) -> tuple[Subject, ...]:
    """The subjects to verify.

    Args:
        problem: its device, dtype and sizes decide what can run.
        choice: ``all`` for everything that the device runs, ``auto`` for the policy's choices, or a path's name.

    Raises:
        UnsupportedTarget: the device can't run the named path.
        ConfigError: no path has that name, or it needs MXFP8 weights and the sizes are no multiples of 32.
    """
    if choice != "all" and choice not in [path.value for path in Path]:
        raise ConfigError(f"path is {choice!r}; it must be 'all' or one of {', '.join(p.value for p in Path)}")
    quantisable = problem.hidden % BLOCK == 0 and problem.intermediate % BLOCK == 0
    if choice == Path.AUTO.value:
        return _automatic(problem, quantisable)
    asked = [path for path in Path if path is not Path.AUTO] if choice == "all" else [Path(choice)]
    found: list[Subject] = []
    refused: UnsupportedTarget | None = None
    for subject in (subject for path in asked for subject in _candidates(problem, path)):
        if subject.stored is Stored.MXFP8 and not quantisable:
            continue
        try:
            _decide(problem, subject.path, {subject.form}, subject.combine)
        except UnsupportedTarget as error:
            refused = refused or error
            continue
        found.append(subject)
    if not found and refused is not None:
        raise refused
    if not found:
        raise ConfigError(
            f"hidden is {problem.hidden} and intermediate {problem.intermediate}; path {choice!r} has MXFP8 weights,"
            f" whose sizes must be multiples of {BLOCK}"
        )
    return tuple(found)


def _candidates(problem: Problem, path: Path) -> list[Subject]:
    """Every subject with this path, whether it can run or not."""
    combines = list(Combine) if path in FP8_PATHS else [Combine.DETERMINISTIC]
    forms = READABLE[problem.target].get(path, _NATURAL[path])
    return [Subject(path, _stored(form), form, combine) for form in forms for combine in combines]


def _automatic(problem: Problem, quantisable: bool) -> tuple[Subject, ...]:
    """What AUTO becomes on dense weights, and on MXFP8 weights as they are and prepared."""
    forms = [form for forms in READABLE[problem.target].values() for form in forms]
    found: list[Subject] = []
    for form in dict.fromkeys([*_NATURAL[Path.REFERENCE], *forms]):
        if _stored(form) is Stored.DENSE or quantisable:
            try:
                subject = Subject(_decide(problem, Path.AUTO, {form}, Combine.DETERMINISTIC), _stored(form), form)
            except UnsupportedTarget:  # activations of a dtype for which these weights have no kernel
                continue
            found.append(subject)
    return tuple(found)


def _stored(form: WeightFormat) -> Stored:
    return Stored.DENSE if form is WeightFormat.DENSE else Stored.MXFP8


def _decide(problem: Problem, path: Path, forms: set[WeightFormat], combine: Combine) -> Path:
    """The path that every token count of the problem takes."""
    kind = (path, problem.target, problem.shape, frozenset(forms), problem.dtype, combine)
    product = device_name(problem.device)
    return decide(CallKind(*kind, type(problem.activation), problem.bias, product), max(problem.tokens)).path
