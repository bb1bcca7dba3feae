"""What epfuse uses of vLLM, read from its source without importing it, and which tested release has the same.

A build of a tested release may have any version text, and any change; whether epfuse fits is decided by how the classes
look. Where a class lists what a layer can be told (`FusedMoEConfig`) or asked (`FusedMoEExperts`), the whole list
counts: what a build adds there, epfuse would ignore.
"""

from __future__ import annotations

import ast
import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epfuse.arguments import checks_enums
from epfuse.errors import ConfigError
from epfuse.input_file import read_file, read_json

RECORD = Path(__file__).with_name("interfaces.json")
"""Tested release -> use -> its parts in one string; ``tools/vllm_releases.py`` writes it."""
LAYERS = "model_executor/layers/"
MOE = f"{LAYERS}fused_moe/"
QUANT = f"{LAYERS}quantization/"

Parts = tuple[str, ...]
Interfaces = dict[str, Parts]


class What(enum.Enum):
    """Which parts of a thing count."""

    PARAMETERS = "parameters of"
    """All, of a function, in their order."""
    FIELDS = "fields of"
    """All, of a dataclass."""
    MEMBERS = "members of"
    """All, of a class."""
    NAMES = "names in"
    """Those that are used, of a module, a class and what its methods set on ``self``."""


@checks_enums
@dataclass(frozen=True)
class Use:
    """One thing of vLLM's that epfuse calls, reads, overrides or replaces.

    Attributes:
        what: which of its parts count.
        file: below ``vllm/``.
        of: a class, or a function ``name`` or ``Class.name``; empty for the module.
        names: with NAMES, the used ones.
    """

    what: What
    file: str
    of: str = ""
    names: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.what.value} {self.of} ({self.file})" if self.of else f"{self.what.value} {self.file}"


def _names_in(file: str, of: str, names: str) -> Use:
    return Use(What.NAMES, file, of, frozenset(names.split()))


USES = (
    _names_in("config/vllm.py", "", "get_current_vllm_config_or_none"),
    _names_in("envs.py", "", "VLLM_BATCH_INVARIANT"),
    _names_in("model_executor/custom_op.py", "", "op_registry_oot"),
    Use(What.PARAMETERS, "model_executor/custom_op.py", "PluggableLayer.register_oot"),
    Use(What.PARAMETERS, "model_executor/utils.py", "replace_parameter"),
    Use(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts.__init__"),
    Use(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts._get_quant_method"),
    Use(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts._map_global_expert_id_to_local_expert_id"),
    Use(What.PARAMETERS, f"{MOE}routed_experts.py", "RoutedExperts.weight_loader"),
    _names_in(
        f"{MOE}routed_experts.py",
        "RoutedExperts",
        "activation apply_router_weight_on_input expert_map expert_map_manager layer_name params_dtype quant_method"
        " swiglu_alpha swiglu_beta swiglu_limit",
    ),
    _names_in(f"{MOE}expert_map_manager.py", "ExpertMapManager", "num_fused_shared_experts"),
    _names_in(f"{MOE}activation.py", "MoEActivation", "SILU='silu' SWIGLUOAI_UNINTERLEAVE='swigluoai_uninterleave'"),
    Use(What.FIELDS, f"{MOE}config.py", "FusedMoEConfig"),
    Use(What.FIELDS, f"{MOE}config.py", "FusedMoEParallelConfig"),
    _names_in(f"{MOE}config.py", "FusedMoEParallelConfig", "use_all2all_kernels use_batched_activation_format"),
    _names_in(f"{MOE}config.py", "FusedMoEQuantConfig", "gemm1_alpha gemm1_beta gemm1_clamp_limit"),
    _names_in(f"{MOE}modular_kernel.py", "FusedMoEActivationFormat", "Standard"),
    _names_in(f"{MOE}modular_kernel.py", "FusedMoEKernel", "fused_experts"),
    Use(What.MEMBERS, f"{MOE}modular_kernel.py", "FusedMoEExperts"),
    Use(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExperts.__init__"),
    Use(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExperts.is_supported_config"),
    Use(What.MEMBERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular"),
    Use(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular.apply"),
    Use(What.PARAMETERS, f"{MOE}modular_kernel.py", "FusedMoEExpertsModular.workspace_shapes"),
    _names_in(f"{MOE}topk_weight_and_reduce.py", "", "TopKWeightAndReduceNoOP"),
    _names_in(f"{MOE}oracle/fp8.py", "Fp8MoeBackend", "TRITON_MXFP8"),
    _names_in(f"{MOE}oracle/unquantized.py", "UnquantizedMoeBackend", "TRITON"),
    _names_in(f"{MOE}fused_moe_method_base.py", "FusedMoEMethodBase", "moe_kernel"),
    _names_in(
        f"{MOE}unquantized_fused_moe_method.py",
        "UnquantizedFusedMoEMethod",
        "experts_cls process_weights_after_loading unquantized_backend",
    ),
    _names_in(f"{QUANT}utils/quant_utils.py", "", "kMxfp8Dynamic kMxfp8Static"),
    _names_in(
        f"{QUANT}modelopt.py", "ModelOptMxFp8FusedMoE", "experts_cls mxfp8_backend process_weights_after_loading"
    ),
    _names_in(
        f"{QUANT}compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w8a8_mxfp8.py",
        "CompressedTensorsW8A8Mxfp8MoEMethod",
        "experts_cls fp8_backend process_weights_after_loading",
    ),
    _names_in(
        f"{QUANT}online/mxfp8.py", "Mxfp8OnlineMoEMethod", "experts_cls fp8_backend process_weights_after_loading"
    ),
)


def read_interfaces(package: Path) -> Interfaces:
    """What a vLLM has of all that epfuse uses; nothing of it is run.

    Args:
        package: its ``vllm`` directory.

    Returns:
        By use, the parts that are there, sorted (parameters in their order); none where a file or class is missing.
    """
    modules: dict[str, ast.Module | None] = {}
    found: Interfaces = {}
    for use in USES:
        if use.file not in modules:
            modules[use.file] = _parsed(package / use.file)
        module = modules[use.file]
        found[str(use)] = () if module is None else _parts(module, use)
    return found


@functools.cache
def known_interfaces() -> dict[str, Interfaces]:
    """Tested release -> what it has."""
    record = read_json(RECORD, "record of vLLM's interfaces")
    return {release: {use: tuple(parts.split()) for use, parts in uses.items()} for release, uses in record.items()}


@dataclass(frozen=True)
class Match:
    """The tested release that a vLLM is most like.

    Attributes:
        release: which.
        differences: a phrase for each thing that epfuse uses and that is not the same; empty if epfuse fits.
    """

    release: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        shown, more = "; ".join(self.differences[:3]), len(self.differences) - 3
        return f"{shown}{f'; and {more} more' if more > 0 else ''}, compared with {self.release}"


def nearest(package: Path) -> Match:
    """The tested release whose interfaces a vLLM shares, or the one that it shares most with.

    Args:
        package: its ``vllm`` directory.
    """
    found = read_interfaces(package)
    matches = [Match(release, _differences(known, found)) for release, known in known_interfaces().items()]
    return min(reversed(matches), key=lambda match: len(match.differences))  # of equals the newest


def _differences(known: Interfaces, found: Interfaces) -> tuple[str, ...]:
    phrases = []
    for use, expected in known.items():
        parts = found.get(use, ())
        if parts == expected:
            continue
        lacks, adds = [p for p in expected if p not in parts], [p for p in parts if p not in expected]
        said = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"adds {', '.join(adds)}"] * bool(adds)
        phrases.append(f"{use} {'is missing' if not parts else ' and '.join(said) or 'has another order'}")
    return tuple(phrases)


def _parsed(file: Path) -> ast.Module | None:
    try:
        return ast.parse(read_file(file, "vLLM's"))
    except (ConfigError, SyntaxError, ValueError, RecursionError):
        return None


def _parts(module: ast.Module, use: Use) -> Parts:
    scope: ast.AST | None = module
    for name in filter(None, use.of.split(".")):
        scope = None if scope is None else _definition(scope, name)
    match use.what, scope:
        case What.PARAMETERS, ast.FunctionDef() | ast.AsyncFunctionDef():
            return _parameters(scope)
        case What.FIELDS, ast.ClassDef():
            return tuple(sorted(_fields(scope)))
        case What.MEMBERS, ast.ClassDef():
            return tuple(sorted(set(_names(scope))))
        case What.NAMES, ast.ClassDef():
            return tuple(sorted(use.names & {*_names(scope), *_assigned_to_self(scope)}))
        case What.NAMES, ast.Module():
            return tuple(sorted(use.names & set(_names(scope))))
        case _:
            return ()


def _definition(scope: ast.AST, name: str) -> ast.AST | None:
    """The last class or function of that name: overloads come before it."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return next((node for node in reversed([*_body(scope)]) if isinstance(node, kinds) and node.name == name), None)


def _body(scope: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module or class, with those under its conditions."""
    for statement in getattr(scope, "body", []):
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _body(statement)
            yield from _body(ast.Module(body=statement.orelse, type_ignores=[]))


def _names(scope: ast.AST) -> Iterator[str]:
    """What a module or a class defines; a string also as ``name='value'``, as enums have it."""
    for statement in _body(scope):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id
                    if isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                        yield f"{target.id}={statement.value.value!r}"


def _fields(scope: ast.ClassDef) -> Iterator[str]:
    for statement in scope.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id


def _assigned_to_self(scope: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(scope):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                yield node.attr


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Parts:
    """In their order; ``=`` after those that have a default."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    found = [f"{arg.arg}{'=' if place >= required else ''}" for place, arg in enumerate(positional)]
    found += [f"*{given.vararg.arg}"] if given.vararg else ["*"] * bool(given.kwonlyargs)
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append(f"{arg.arg}{'' if default is None else '='}")
    return (*found, f"**{given.kwarg.arg}") if given.kwarg else tuple(found)
