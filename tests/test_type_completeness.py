"""What `make public-types` says of what basedpyright found; the finding itself is CI's."""

from __future__ import annotations

from typing import Any

from tools.type_completeness import faults, modules_with

UNKNOWN = "Type\N{NO-BREAK SPACE}of base class unknown\n  and why"
MODULES = ["epfuse", "epfuse.stages", "epfuse.stages.down.kernel", "epfuse.target", "epfuse.kernel_cache"]


def symbol(name: str, said: str = "", known: bool = True, ambiguous: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "isExported": True,
        "isTypeKnown": known,
        "isTypeAmbiguous": ambiguous,
        "diagnostics": [{"message": said}] if said else [],
    }


def found(*symbols: dict[str, Any]) -> list[str]:
    names = [{"name": name} for name in MODULES]
    return faults({"modules": names, "symbols": symbols}, ["epfuse.stages.*.kernel"], ["epfuse.kernel_cache"])


def test_an_unknown_and_an_ambiguous_type_are_faults() -> None:
    assert found(
        symbol("epfuse.target.of", "Return type annotation is missing", known=False),
        symbol("epfuse.target.log", "could be inferred differently", ambiguous=True),
        symbol("epfuse.target.Target"),
    ) == [
        "epfuse.target.of: Return type annotation is missing",
        "epfuse.target.log: could be inferred differently",
    ]


def test_device_code_and_base_classes_that_are_not_installed_are_none() -> None:
    assert not found(
        symbol("epfuse.stages.down.kernel.down", "no type", known=False),
        symbol("epfuse.kernel_cache.KernelCache", UNKNOWN, known=False),
    )


def test_other_base_classes_and_other_faults_of_those_modules_are() -> None:
    assert found(
        symbol("epfuse.target.Kind", UNKNOWN, known=False),
        symbol("epfuse.kernel_cache.folder", "Return type is unknown", known=False),
    ) == ["epfuse.target.Kind: Type of base class unknown", "epfuse.kernel_cache.folder: Return type is unknown"]


def test_what_is_left_out_is_named_where_mypy_leaves_it_out() -> None:
    assert "epfuse.stages.*.kernel" in modules_with("ignore_errors", True)
    assert "epfuse.kernel_cache" in modules_with("disallow_subclassing_any", False)
