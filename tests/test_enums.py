"""No name or value of an enum stands for its member: every public function that takes one says so before it runs."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator

import pytest
import torch

import epfuse
from epfuse import Combine, ExpertMap, ExpertWeights, LayerShape, Path, Target, fused_experts
from epfuse.arguments import checks_enums, enums_of
from epfuse.config import MINIMAX_M3_EP8
from epfuse.errors import ConfigError
from epfuse.families.family import CallKind
from epfuse.numerics.mxfp8 import MXFP8

PACKAGES = (
    *("numerics", "policy", "stages", "verify", "weights"),
    *("aot", "bench", "demo", "integrations", "parallel", "planning", "tuning", "measured", "hardware"),
)
MODULES = ("api", "config", "environment", "expert_map", "families.registry", "scratch", "target")


def modules() -> Iterator[object]:
    for name in MODULES:
        yield importlib.import_module(f"epfuse.{name}")
    for package in PACKAGES:
        root = importlib.import_module(f"epfuse.{package}")
        for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if package == "stages" and found.name.rsplit(".", 1)[1].startswith("kernel"):
                continue
            if found.name == "epfuse.stages.extent":  # launchers ask it at each launch, with a target that is known
                continue
            try:
                yield importlib.import_module(found.name)
            except ModuleNotFoundError as missing:
                if not str(missing.name).startswith(("sglang", "vllm")):  # their classes have no enums of ours
                    raise


def functions_of(module: object) -> Iterator[tuple[str, Callable[..., object]]]:
    """Public functions and methods of a module, and the constructors of its public dataclasses."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value
        elif isinstance(value, type) and not issubclass(value, enum.Enum) and not getattr(value, "_is_protocol", False):
            for method, inner in vars(value).items():
                function = getattr(inner, "__func__", inner)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{module.__name__}.{name}.{method}", function


def takers() -> list[tuple[str, Callable[..., object], str, type[enum.Enum], bool]]:
    found = []
    functions = [entry for module in modules() for entry in functions_of(module)]
    for where, function in [*functions, ("epfuse.families.family.CallKind.__init__", CallKind.__init__)]:
        try:
            hints = enums_of(function)
        except NameError:  # names that are imported for type checking only: none of them an enum
            continue
        found += [(where, function, name, kind, many) for name, (kind, _, many) in hints.items()]
    return found


TAKERS = takers()


def test_there_are_takers() -> None:
    names = {where for where, *_ in TAKERS}
    for known in (
        "epfuse.weights.experts.ExpertWeights.block_fp8",
        "epfuse.weights.experts.ExpertWeights.quantize",
        "epfuse.weights.experts.ExpertWeights.prepare",
        "epfuse.numerics.mxfp8.MXFP8.quantize",
        "epfuse.families.registry.scratch_size",
        "epfuse.policy.plan.plan_layer",
        "epfuse.policy.layer.LayerRequest.__init__",
        "epfuse.families.family.CallKind.__init__",
        "epfuse.api.fused_experts",
        "epfuse.target.planning_for",
    ):
        assert known in names


@pytest.mark.parametrize(
    ("where", "function", "name", "kind", "many"), TAKERS, ids=[f"{where}-{name}" for where, _, name, *_ in TAKERS]
)
def test_a_name_is_refused_before_anything_runs(
    where: str, function: Callable[..., object], name: str, kind: type[enum.Enum], many: bool
) -> None:
    """The other arguments are of no use to anybody: the first thing that is looked at is the enum."""
    right: dict[str, object] = {}
    for other, (its_kind, _, its_many) in enums_of(function).items():
        member = next(iter(its_kind))
        right[other] = (member,) if its_many else member
    parameters = inspect.signature(function).parameters.values()
    useless = {parameter.name: object() for parameter in parameters if parameter.default is inspect.Parameter.empty}
    for one in list(kind)[-1:]:
        for wrong in (one.name.lower(), one.value, one.name):
            if wrong in list(kind):
                continue
            given = useless | right | {name: (wrong,) if many else wrong}
            with pytest.raises(ConfigError) as caught:
                function(**given)
            assert name in str(caught.value)
            assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: ExpertWeights.block_fp8(*p, scale="power_of_two"), "scale is 'power_of_two'; it must be"),
        (lambda p: ExpertWeights.block_fp8(*p, scale="amax"), "BlockScale.POWER_OF_TWO, BlockScale.AMAX"),
        (lambda p: ExpertWeights.quantize(dense(p), "ceil"), "rounding is 'ceil'; it must be an epfuse.ScaleRounding"),
        (lambda p: epfuse.scratch_size("bf16", 1, 1, 32, 32), "path is 'bf16'"),
        (lambda p: LayerShape(32, 32, 2, 2, "1"), "LayerShape.top_k is '1'"),
        (lambda p: call(p, combine="atomic"), "combine is 'atomic'; it must be an epfuse.Combine"),
        (lambda p: call(p, path="reference"), "path is 'reference'"),
        (lambda p: call(p, combine=None), "combine is None"),
    ],
)
def test_the_ones_that_took_another_branch(call: Callable[[object], object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(parts())
    assert words in str(caught.value)


def parts() -> tuple[torch.Tensor, ...]:
    stacks = (torch.randn(1, 64, 32), torch.randn(1, 32, 32))
    return tuple(part for w in map(MXFP8.quantize, stacks) for part in (w.values, w.scales))


def dense(p: tuple[torch.Tensor, ...]) -> ExpertWeights:
    return ExpertWeights.dense(MXFP8(*p[:2]).dequantize(), MXFP8(*p[2:]).dequantize())


def call(p: tuple[torch.Tensor, ...], **options: object) -> torch.Tensor:
    hidden, ids = torch.ones(1, 32, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    return fused_experts(hidden, ExpertWeights.mxfp8(*p), torch.ones(1, 1), ids, ExpertMap.all_local(1), **options)


def test_the_decorator_reads_annotations_and_leaves_the_function_alone() -> None:
    @checks_enums
    def sample(one: Path, other: Target | None = None, *, many: tuple[Combine, ...] = ()) -> typing.Any:
        """Words."""
        return one, other, many

    assert sample.__doc__ == "Words."
    assert sample(Path.BF16) == (Path.BF16, None, ())
    assert sample(one=Path.BF16, other=None, many=(Combine.ATOMIC,)) == (Path.BF16, None, (Combine.ATOMIC,))
    for wrong in (
        lambda: sample("bf16"),
        lambda: sample(None),
        lambda: sample(Path.BF16, "sm_90"),
        lambda: sample(Path.BF16, Path.BF16),
        lambda: sample(Path.BF16, many="atomic"),
        lambda: sample(Path.BF16, many=("atomic",)),
        lambda: sample(Path.BF16, many=None),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        sample()
    assert MINIMAX_M3_EP8.top_k == 4
