"""The numbers that a checkpoint has for its experts: everything in its files that says so must agree.

Sources of the words: transformers' and vLLM's readers of ``quantization_config``, ModelOpt's ``hf_quant_config.json``,
compressed-tensors' ``config_groups``.
"""

from __future__ import annotations

from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.config_fields import Fields
from epfuse.weights.config_modules import ExpertModules

BLOCK = [128, 128]
"""Rows and columns that share a scale in `Checkpoint.BLOCK_FP8`."""
METHODS = ("mxfp8", "mxfp4", "fp8", "modelopt", "compressed-tensors")
ALGORITHMS = {
    "MXFP8": Checkpoint.MXFP8,
    "MXFP4": Checkpoint.MXFP4,
}
"""Names in ``quant_algo`` and ``moe_quant_algo``."""
EXCLUDING = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Lists of modules that are not quantised."""
HARMLESS = frozenset(
    {
        "activation_scheme",
        "dequantize",
        "fmt",
        "format",
        "global_compression_ratio",
        "kv_cache_dtype",
        "kv_cache_quant_algo",
        "kv_cache_scheme",
        "modules_to_convert",
        "packed_modules_mapping",
        "producer",
        "provider",
        "quantization_status",
        "sparsity_config",
        "transform_config",
        "version",
    }
)
"""Fields that say nothing of the experts' numbers, or nothing that others don't say; any other is refused."""
E4M3 = ("e4m3", "float8_e4m3fn")


def experts_format(quantization: Fields | None, modules: ExpertModules) -> Checkpoint:
    """The experts' numbers.

    Args:
        quantization: the quantisation config; None where there is none.
        modules: the experts' names.

    Raises:
        ConfigError: it is a format that epfuse does not read, fields contradict each other, a field is not understood,
            or the experts of some layers are in another format than the experts of others.
    """
    if quantization is None:
        return Checkpoint.BF16
    nested = quantization.child("quantization")  # ModelOpt's own file
    config = quantization if nested is None else nested
    method = _method(quantization, is_modelopt=nested is not None)
    said: dict[str, Checkpoint] = {}
    if method in ("mxfp8", "mxfp4"):
        said[f"quant_method {method}"] = Checkpoint(method)
    for key in ("quant_algo", "moe_quant_algo"):
        _algorithm(config, key, modules, said)
    if method == "fp8":
        _fine_grained(config, said)
    if method == "compressed-tensors":
        _config_groups(config, modules, said)
    _element_types(config, said)
    if not said:
        raise config.refuse(f"nothing says what numbers quant_method {method!r:.40} has for the experts")
    if len(set(said.values())) > 1:
        words = ", ".join(f"{field} says {form.value}" for field, form in said.items())
        raise config.refuse(f"the fields about the experts' numbers contradict each other: {words}")
    form = next(iter(said.values()))
    _sizes(config, form)
    for fields in (quantization, config):
        for key, value in fields.unread():
            if key not in HARMLESS and key not in EXCLUDING:
                raise fields.refuse(f"{key} is {value!r:.40}, a field that is not understood and could matter")
    return Checkpoint.BF16 if _excluded(config, modules) else form


def _method(config: Fields, is_modelopt: bool) -> str:
    method = config.text("quant_method")
    if method is None and is_modelopt:
        return "modelopt"
    known = {"modelopt_mxfp8": "modelopt", "modelopt_mixed": "modelopt"}
    found = known.get(method or "", method)
    if found not in METHODS:
        raise config.refuse(f"quant_method is {method!r:.40}; it must be one of {', '.join(METHODS)}")
    return found


def _algorithm(config: Fields, key: str, modules: ExpertModules, said: dict[str, Checkpoint]) -> None:
    name = config.text(key)
    if name is None:
        return
    if name.upper() == "MIXED_PRECISION" and key == "quant_algo":
        _mixed(config, modules, said)
        return
    if name.upper() not in ALGORITHMS:
        raise config.refuse(f"{key} is {name!r:.40}; of the experts' formats {', '.join(ALGORITHMS)} are read")
    said[f"{key} {name}"] = ALGORITHMS[name.upper()]


def _mixed(config: Fields, modules: ExpertModules, said: dict[str, Checkpoint]) -> None:
    """ModelOpt's table of modules, each with an algorithm of its own."""
    table = config.child("quantized_layers")
    if table is None:
        raise config.refuse("quant_algo is MIXED_PRECISION; it needs quantized_layers")
    named: dict[Checkpoint, set[int]] = {}
    for module, entry in table.items():
        layers = modules.named_by(table, "quantized_layers", [module])
        if not layers:
            continue
        fields = table.child(module)
        name = None if fields is None else fields.text("quant_algo")
        if name is None or name.upper() not in ALGORITHMS:
            raise config.refuse(f"quantized_layers has {module!r:.60} with {entry!r:.60}, which is not read")
        named.setdefault(ALGORITHMS[name.upper()], set()).update(layers)
    for form, layers_of in named.items():
        if layers_of != set(modules.layers):
            raise config.refuse(f"quantized_layers has {form.value} for the experts of some layers only")
        said[f"quantized_layers {form.value}"] = form


def _fine_grained(config: Fields, said: dict[str, Checkpoint]) -> None:
    """``fp8``: one scale per block of weights; experts may be FP4 beside FP8 layers (DeepSeek-V4)."""
    scheme = config.text("activation_scheme")
    if scheme not in (None, "dynamic"):
        raise config.refuse(f"activation_scheme is {scheme!r:.40}; it must be 'dynamic'")
    experts = config.text("expert_dtype")
    if experts == "fp4":
        if config.text("scale_fmt") != "ue8m0":
            raise config.refuse("expert_dtype is 'fp4'; it needs scale_fmt 'ue8m0'")
        config.get("weight_block_size")  # of the other layers
        said["expert_dtype fp4"] = Checkpoint.MXFP4
        return
    if experts not in (None, "fp8"):
        raise config.refuse(f"expert_dtype is {experts!r:.40}; it must be 'fp8' or 'fp4'")
    block = config.get("weight_block_size")
    if block == [1, 32] and config.text("scale_fmt") == "ue8m0":
        said["weight_block_size [1, 32]"] = Checkpoint.MXFP8
    elif block == BLOCK and all(type(size) is int for size in block):
        config.get("scale_fmt")  # powers of two are floats, too
        said["weight_block_size [128, 128]"] = Checkpoint.BLOCK_FP8
    else:
        raise config.refuse(
            f"weight_block_size is {block!r:.40}; of FP8 experts one scale per block of {BLOCK} is read"
        )


def _config_groups(config: Fields, modules: ExpertModules, said: dict[str, Checkpoint]) -> None:
    groups = config.child("config_groups")
    if groups is None:
        raise config.refuse("config_groups is not there")
    whole = config.text("format")
    rest = set(modules.layers)
    for name, _ in groups.items():
        group = groups.child(name)
        if group is None:
            continue
        targets = group.array("targets", str, "modules") or []
        layers = set(modules.layers)
        if not {"Linear", "FusedMoE", "RoutedExperts"} & set(targets):
            layers = set(
                modules.named_by(group, "targets", [t for t in targets if t not in ("Embedding", "LinearBase")])
            )
        if not layers:
            continue
        weights = group.child("weights")
        if weights is None:
            continue
        form = _arguments(weights)
        layout = group.text("format") or whole
        if layout is not None and layout not in LAYOUTS[form]:
            raise group.refuse(f"format is {layout!r:.40}, and the weights say {form.value}")
        rest -= layers
        said[f"config_groups {name:.40}"] = form
    if said and rest:
        raise config.refuse("config_groups names the experts of some layers only")
    if not said:
        said["config_groups without the experts"] = Checkpoint.BF16


LAYOUTS: dict[Checkpoint, tuple[str, ...]] = {
    Checkpoint.MXFP8: ("mxfp8-quantized", "float-quantized", "naive-quantized"),
    Checkpoint.MXFP4: ("mxfp4-pack-quantized",),
    Checkpoint.BLOCK_FP8: ("float-quantized", "naive-quantized"),
}
"""compressed-tensors' names of how the numbers lie in the file."""


def _arguments(weights: Fields) -> Checkpoint:
    """compressed-tensors' description of one scheme."""
    kind, strategy = weights.text("type"), weights.text("strategy")
    bits = weights.size("num_bits", least=1, most=64)
    group, block = weights.get("group_size"), weights.get("block_structure")
    scales, symmetric = weights.text("scale_dtype"), weights.get("symmetric")
    if kind == "float" and symmetric is not False and not weights.get("dynamic"):
        if strategy == "group" and type(group) is int and group == 32 and scales in ("torch.uint8", "uint8"):
            if bits == 8:
                return Checkpoint.MXFP8
            if bits == 4:
                return Checkpoint.MXFP4
        if strategy == "block" and bits == 8 and block == BLOCK and scales not in ("torch.uint8", "uint8"):
            return Checkpoint.BLOCK_FP8
    raise weights.refuse(
        f"num_bits {bits}, type {kind!r:.20}, strategy {strategy!r:.20}, group_size {group!r:.20}, block_structure"
        f" {block!r:.20}, scale_dtype {scales!r:.20} are not read for experts; they must be MXFP8, MXFP4 or FP8 with a"
        f" scale per block of {BLOCK}"
    )


def _element_types(config: Fields, said: dict[str, Checkpoint]) -> None:
    """``fmt`` of FP8, and ``expert_dtype`` where another method stands beside it."""
    name = config.text("fmt")
    if name is not None and name not in E4M3:
        raise config.refuse(f"fmt is {name!r:.40}; it must be {' or '.join(E4M3)}")
    experts = config.text("expert_dtype")
    if experts is not None and not any(field.startswith(("expert_dtype", "weight_block_size")) for field in said):
        raise config.refuse(f"expert_dtype is {experts!r:.40}, which is read beside quant_method 'fp8' only")


def _sizes(config: Fields, form: Checkpoint) -> None:
    """Sizes that stand beside an algorithm's name."""
    if form is Checkpoint.BF16:
        return
    for key, wanted in SIZES[form].items():
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or value not in wanted):
            raise config.refuse(f"{key} is {value!r:.40}, and the experts are said to be {form.value}")


SIZES: dict[Checkpoint, dict[str, tuple[object, ...]]] = {
    Checkpoint.MXFP8: {"weight_block_size": ([1, 32],), "group_size": (32,), "bits": (8,), "scale_fmt": ("ue8m0",)},
    Checkpoint.MXFP4: {"weight_block_size": (BLOCK,), "group_size": (32,), "bits": (4,), "scale_fmt": ("ue8m0",)},
    Checkpoint.BLOCK_FP8: {
        "weight_block_size": (BLOCK,),
        "group_size": (),
        "bits": (8,),
        "scale_fmt": ("ue8m0", "float"),
    },
}
"""What may stand beside each format; of MXFP4 the block is that of the layers that are FP8."""


def _excluded(config: Fields, modules: ExpertModules) -> bool:
    """Whether the experts are left out of the quantisation."""
    found: set[int] = set()
    for key in EXCLUDING:
        found |= modules.named_by(config, key, config.array(key, str, "modules") or [])
    if not found:
        return False
    if found != set(modules.layers):
        some = ", ".join(map(str, sorted(found)[:8]))
        raise config.refuse(
            f"the experts of layers {some} are not quantised, those of others are; one format is planned"
        )
    return True
