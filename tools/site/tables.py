"""The forms of the files that epfuse reads and writes, from the classes that check them."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Form:
    """One kind of file.

    Attributes:
        title: what it is.
        said: where it lies, who writes it and who reads it.
        classes: module -> its classes that check the file, outermost first.
    """

    title: str
    said: str
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)


FORMS = (
    Form("Plan", "`epfuse plan --json` prints it; [Policy](../policy.md#epfuse-plan) names its keys."),
    Form(
        "Tuned tables",
        "`src/epfuse/measured/tables/TARGET/STAGE.json`. `epfuse tune` writes them, every call's policy reads them"
        " ([how a call finds its row](../policy.md#tuned-tables)).",
        {
            "epfuse.measured.schema": ("TileTable", "Measurement", "TileRow"),
            "epfuse.stages.tiles": (
                "GemmTile",
                "Sm90Tile",
                "Sm90PersistentTile",
                "Sm90DenseTile",
                "Sm90BlockTile",
                "Sm90RowsTile",
            ),
        },
    ),
    Form(
        "Trials",
        "A JSON list. `epfuse tune --trials FILE` judges and times these tiles ([tune](../policy.md#epfuse-tune)).",
        {"epfuse.tuning.trials": ("Trial",)},
    ),
    Form(
        "Kernel bundle",
        "`manifest.json` of the folder that `epfuse warmup` writes and `EPFUSE_KERNELS` names"
        " ([into an image](../howto/kernels-into-an-image.md)).",
        {"epfuse.bundle": ("Manifest", "MadeWith")},
    ),
    Form(
        "Benchmark record",
        "`epfuse bench --json FILE` ([the record](../benchmarking.md#the-record)).",
        {"epfuse.bench.record": ("BenchRecord", "BenchRow")},
    ),
    Form(
        "Profile",
        "`epfuse profile TRACE --json` ([what is in it](../profiling.md#what-is-in-it)).",
        {
            "epfuse.profiling.record": (
                "Profile",
                "PhaseTotal",
                "KernelTotal",
                "LayerTime",
                "WindowTime",
                "TimelineKernel",
            )
        },
    ),
    Form(
        "Rules of phases",
        "YAML. `epfuse profile TRACE --map FILE` sorts kernels by them ([rules](../profiling.md#rules)).",
        {"epfuse.profiling.rules": ("Rule",)},
    ),
    Form(
        "Diagnosis",
        "`epfuse doctor --json` ([the lines](../doctor.md#the-lines)).",
        {"epfuse.doctor.finding": ("Diagnosis", "Finding")},
    ),
    Form(
        "Serving recipes and points",
        "A recipe is YAML; a point's `point.json` has the same fields ([recipes](../serving.md#recipes)).",
        {
            "epfuse.serving.point": (
                "Run",
                "Point",
                "PointJob",
                "Arm",
                "Client",
                "AccuracyGate",
                "Deadlines",
                "Polls",
                "Compare",
                "Slurm",
            )
        },
    ),
    Form(
        "Serving results",
        "`done.json` of a point and `journal.jsonl` of a run ([states](../serving.md#what-each-state-means)).",
        {
            "epfuse.serving.done": ("Done", "Leg", "GateResult"),
            "epfuse.serving.journal": ("Begin", "Change", "Note"),
        },
    ),
)


def shown_fields(module: str, name: str) -> str:
    """The fields that the page lists one by one: none where the class's docstring has them in a table."""
    kind = getattr(importlib.import_module(module), name)
    described = any(f"\n\n{title}:\n" in inspect.getdoc(kind) for title in ("Args", "Attributes"))
    return "false" if described else f"[{', '.join(inspect.get_annotations(kind))}]"


def pages() -> dict[str, str]:
    """Page -> its text."""
    lines = ["# Files", "", "Every file is checked when it is read; the error names the place that is wrong.", ""]
    for form in FORMS:
        lines += [f"## {form.title}", "", form.said, ""]
        for module, names in form.classes.items():
            for name in names:
                lines += [f"::: {module}.{name}", "    options:", "      heading_level: 3"]
                lines += [f"      members: {shown_fields(module, name)}", "      show_if_no_docstring: true", ""]
    return {"reference/files.md": "\n".join(lines)}
