"""Make docs/models.md: every experts class of transformers, and what epfuse does with it.

    python tools/models_table.py                    # docs/models.md, from the records and the installed transformers
    python tools/models_table.py --record FILE      # the record of the transformers that is imported, for FILE

The rules are those that `register()`, `replace_experts` and `fused_experts` ask; nothing is written by hand.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import sys
from typing import Any

import torch
import transformers

from epfuse.config import ACTIVATIONS, Activation, Bias, LayerShape, Path
from epfuse.errors import EpfuseError
from epfuse.integrations.transformers.activation import activation_of
from epfuse.integrations.transformers.layout import check_in_place, layout_of
from epfuse.policy import CallKind, decide
from epfuse.report.write import write_atomic
from epfuse.target import Target
from epfuse.weights.config_families import FAMILIES, UNPLANNED
from epfuse.weights.layouts import GateUpRows, MatrixOrder

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
RECORDS = ROOT / "docs" / "records"
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
STEMS = {"Ernie4_5_VLMoeMoeExperts": "Ernie4_5_VLMoe", "Qwen3OmniMoeThinkerTextExperts": "Qwen3OmniMoe"}
"""What the name of a configuration begins with, where it isn't what the name of the experts begins with."""
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), 128),
}
HEAD = """# Models

Every experts class of transformers that asks its experts interface, and what epfuse does with it. This page is made by
`tools/models_table.py` from the rules that `register()`, `replace_experts` and `fused_experts` ask; a test compares.

Layout: how gate and up rows lie, and whether matrices are transposed. Below a target: the path of 64 tokens with BF16
weights at H 2048 and I 768, and the family of kernels that runs it ([DESIGN.md](../DESIGN.md)). The plugins of vLLM and
SGLang serve layers whose activation is a SwiGLU; of those with biases SGLang's serves none, and vLLM's BF16 weights and
the MXFP8 that vLLM makes of them. MXFP4, in which gpt-oss is published, stays with vLLM's own experts: epfuse would
keep it as MXFP8, twice the bytes ([vllm.md](vllm.md#what-is-left-to-vllm)). In `plan`: whether `epfuse plan`,
`epfuse vllm explain` and `epfuse checkpoint` read the family's config.json under that name.

"""


def rows() -> list[dict[str, str]]:
    """A row a class, in the order of their names."""
    found = []
    for file in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in DECORATED.findall(file.read_text(encoding="utf-8")):
            found.append(_row(file.parent.name, f"transformers.models.{file.parent.name}.{file.stem}", name))
    return found


def _row(family: str, module: str, name: str) -> dict[str, str]:
    row = {"family": family, "class": name}
    try:
        experts = _experts(module, name)
    except Exception as reason:  # a model's own code may raise anything
        return row | {
            "layout": "?",
            "biases": "?",
            "activation": "?",
            "state": f"can't be built: {type(reason).__name__}",
        }
    row["layout"] = _layout(experts)
    row["biases"] = "yes" if getattr(experts, "has_bias", False) else "no"
    try:
        check_in_place("", experts)
        activation = activation_of("experts", experts)
    except EpfuseError as reason:
        return row | {"activation": "", "state": "refused", "why": _plain(str(reason))}
    return row | {"activation": str(activation), "state": "taken"}


def _decided(row: dict[str, str]) -> dict[str, str]:
    """A row with what this version's own rules say of it, whichever release of transformers it is from."""
    found = {"plan": _planned(row["family"])}
    kinds = {kind.__name__: kind for kind in ACTIVATIONS}
    if row["state"] == "taken":
        bias = Bias.ADDED if row["biases"] == "yes" else Bias.NONE
        found |= {target.value: _path(target, kinds[row["activation"].partition("(")[0]], bias) for target in Target}
    return row | found


def _path(target: Target, activation: type[Activation], bias: Bias) -> str:
    """The path of a call of 64 tokens and its kernels, by the policy that `fused_experts` asks."""
    shape = LayerShape(hidden=2048, intermediate=768, experts=128, local_experts=16, top_k=8)
    decision = decide(CallKind(Path.AUTO, target, shape, activation=activation, bias=bias), 64)
    return decision.path.value + ("" if decision.family is None else f", {decision.family.name}")


def _planned(family: str) -> str:
    known = FAMILIES.get(family, FAMILIES.get(f"{family}_text"))
    if known is not None:
        return "yes" if known.groups == 1 else f"yes, {known.groups} groups a layer, one at a time from a checkpoint"
    return f"no: {UNPLANNED[family]}" if family in UNPLANNED else "no"


def _experts(module: str, name: str) -> Any:
    """A small module of a class, with its family's own default configuration."""
    configs = vars(importlib.import_module(module.replace("modeling_", "configuration_")))
    stem = STEMS.get(name) or name.removesuffix("Experts")
    text = [config for key, config in configs.items() if re.fullmatch(rf"{stem}\w*Config", key)]
    text.sort(key=lambda config: (not config.__name__.endswith("TextConfig"), len(config.__name__)))
    config = text[0]()
    for key, value in SIZES.items():
        per_modality = isinstance(getattr(config, key, None), list)  # Ernie-4.5-VL: of text, of images
        setattr(config, key, [value, value] if per_modality else value)
    config._experts_implementation = "eager"
    more = [SIZES["intermediate_size"]] if name.startswith("Ernie4_5_VL") else []
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(config, *more)


def _layout(experts: Any) -> str:
    if not getattr(experts, "has_gate", True):
        return "no gate"
    layout = layout_of(experts)
    rows_of = "interleaved" if layout.gate_up is GateUpRows.ALTERNATING else "halves"
    return rows_of + (", transposed" if layout.matrices is MatrixOrder.COLUMNS else "")


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(newest: dict[str, Any], pinned: list[dict[str, str]]) -> str:
    """The page: the pinned release's classes, then what the newest one has otherwise.

    Args:
        newest: the record of the newest release.
        pinned: `rows` of the installed one.
    """
    here, there = [_decided(row) for row in pinned], [_decided(row) for row in newest["rows"]]
    taken = sum(row["state"] == "taken" for row in here)
    lines = [
        HEAD,
        f"## transformers {transformers.__version__}",
        "",
        f"{taken} of {len(here)} classes are taken.",
        "",
    ]
    lines += _table(here)
    lines += ["", f"## transformers {newest['transformers']}", ""]
    before = {row["class"]: row for row in here}
    others = [row for row in there if before.get(row["class"]) != row]
    gone = sorted(before.keys() - {row["class"] for row in there})
    lines.append(f"{len(there)} classes. " + ("" if others else "None differs. ") + f"Gone: {len(gone)}.")
    if others:
        lines += ["", *_table(others)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _table(found: list[dict[str, str]]) -> list[str]:
    targets = [target.value for target in Target]
    columns = ["family", "class", "activation", "layout", "biases", *targets, "plan", "state", "why"]
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row.get(column, '') for column in columns)} |" for row in found),
    ]


def newest_record() -> dict[str, Any]:
    """The record of the newest release that was looked at."""
    found: dict[str, Any] = json.loads(max(RECORDS.glob("models-transformers-*.json")).read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the page, or a record."""
    if sys.argv[1:2] == ["--record"]:
        record = {"transformers": transformers.__version__, "rows": rows()}
        write_atomic(pathlib.Path(sys.argv[2]), json.dumps(record, indent=1) + "\n")
    else:
        write_atomic(PAGE, page(newest_record(), rows()))


if __name__ == "__main__":
    main()
