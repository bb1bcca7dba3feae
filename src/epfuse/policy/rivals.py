"""Whether epfuse beats what would run a layer otherwise: a table of evidence, and nothing is taken without."""

from __future__ import annotations

from dataclasses import dataclass

from epfuse.config import Path
from epfuse.policy.layer import LayerPlan, Storage
from epfuse.target import REFERENCE_DEVICE, Target
from epfuse.weights.panels import STEP_K


@dataclass(frozen=True)
class Evidence:
    """Why epfuse is the faster one.

    Attributes:
        reason: one sentence: measured or predicted, and where that can be read.
        hopper: whether it is about the Hopper kernels, and says nothing of the portable ones.
    """

    reason: str
    hopper: bool = False


EVIDENCE: dict[tuple[Target, str, Path], Evidence] = {
    (Target.SM90, "MarlinExperts", Path.W8A16): Evidence(
        "w8a16 is measured to take 0.41 to 0.97 of MarlinExperts' time on an H100, 0.40 to 0.94 on an H200"
        " (docs/performance.md).",
        hopper=True,
    ),
    (Target.SM90, "TritonExperts", Path.BF16): Evidence(
        "On an H100 bf16 is measured to take 0.63 to 0.94 of TritonExperts' time (docs/performance.md, docs/vllm.md).",
        hopper=True,
    ),
    (Target.SM90, "HummingGroupedExperts", Path.W8A16): Evidence(
        "w8a16 is measured to take 0.54 to 0.97 of HummingGroupedExperts' time on an H100 (five layers), 0.48 to 0.85"
        " on an H200 (one layer; docs/performance.md).",
        hopper=True,
    ),
    (Target.SM90, "HummingIndexedExperts", Path.W8A16): Evidence(
        "w8a16 is measured to take 0.70 to 1.00 of HummingIndexedExperts' time on an H100 (five layers), 0.64 to 0.89"
        " on an H200 (one layer; docs/performance.md).",
        hopper=True,
    ),
    (Target.GFX942, "Mxfp8EmulationTritonExperts", Path.W8A16): Evidence(
        "On MI300X w8a16 is predicted to take 0.55 to 0.83 of the time of vLLM's BF16 GEMMs (docs/mi300x.md)."
    ),
    (Target.GFX942, "TritonExperts", Path.BF16): Evidence(
        "The GEMMs are predicted to be even; TritonExperts' activation and sum pass over other ranks' rows, too."
    ),
    (Target.GFX942, "block FP8 made of MXFP8", Path.W8A16): Evidence(
        "SGLang makes MXFP8 block FP8 when it loads it, which changes the weights; epfuse's stay exact, and w8a16 is"
        " predicted to take 0.55 to 0.83 of the time of BF16 GEMMs (docs/mi300x.md)."
    ),
    (Target.CPU, "Mxfp8EmulationTritonExperts", Path.W8A16): Evidence(
        "vLLM's choice needs Triton, which vLLM has not on a CPU."
    ),
}
"""(target, class of the experts that would run otherwise, our path) -> evidence.

A row is added when a measurement on the target, or a prediction for it, says that epfuse wins at most token counts and
clearly loses at none. Missing so far: gfx950, where nothing is measured or predicted.
"""

CUT_SHORT: dict[tuple[str, str, int, int], str] = {
    ("NVIDIA H200", "TritonExperts", 2880, 2880): (
        "With gpt-oss's biases bf16 is measured to take 0.69 to 0.99 of TritonExperts' time on an H200 (docs/vllm.md)."
    ),
}
"""(product, class of the experts that would run otherwise, H, I) -> evidence for dense rows that are no whole steps.

What is known of whole steps says nothing of them, nor a product's measurement of another product: vLLM has tiles of its
own for some shapes on some products.
"""


def why_declined(plan: LayerPlan) -> str | None:
    """Why a layer is better left to its rival; None if the plan is better, or nobody else would run it.

    Args:
        plan: what epfuse would do.
    """
    rival, target = plan.request.rival, plan.request.target
    if rival is None:
        return None
    evidence = evidence_of(plan, rival)
    if evidence is None:
        paths = " or ".join(path.value for path in _compared(plan))
        return f"No measurement or prediction says that epfuse's {paths} is faster than {rival} on {target.value}."
    if evidence.hopper and plan.why_portable is not None:
        return (
            f"The Hopper kernels, which are faster than {rival}, don't run, and the portable ones are not known to be:"
            f" {plan.why_portable}"
        )
    if evidence.hopper and _is_cut_short(plan) and _cut_short_key(plan, rival) not in CUT_SHORT:
        shape = plan.request.shape
        return (
            f"H={shape.hidden} and I={shape.intermediate} are no multiples of {STEP_K}: no measurement on"
            f" {_product(plan)} says that the Hopper kernels are faster than {rival} where the last step of dense rows"
            " is cut short."
        )
    return None


def why_taken(plan: LayerPlan) -> str | None:
    """The evidence for a plan that was not declined; None if nobody else would run the layer."""
    rival = plan.request.rival
    found = None if rival is None else evidence_of(plan, rival)
    if found is None or rival is None:
        return None
    return CUT_SHORT[_cut_short_key(plan, rival)] if found.hopper and _is_cut_short(plan) else found.reason


def evidence_of(plan: LayerPlan, rival: str) -> Evidence | None:
    """What says that all of a plan's paths are faster than a rival; None if nothing does.

    Args:
        plan: what epfuse would do.
        rival: class of the experts that would run otherwise.
    """
    found = [EVIDENCE.get((plan.request.target, rival, path)) for path in _compared(plan)]
    return found[0] if len(found) == 1 else None


def _is_cut_short(plan: LayerPlan) -> bool:
    """Whether the last step of some dense row is no whole one."""
    shape = plan.request.shape
    return plan.storage is Storage.BF16 and bool(shape.hidden % STEP_K or shape.intermediate % STEP_K)


def _cut_short_key(plan: LayerPlan, rival: str) -> tuple[str, str, int, int]:
    return _product(plan), rival, plan.request.shape.hidden, plan.request.shape.intermediate


def _product(plan: LayerPlan) -> str:
    return plan.request.device_name or REFERENCE_DEVICE[plan.request.target]


def _compared(plan: LayerPlan) -> list[Path]:
    """The paths that have to be faster: beside W8A16 a BF16 copy runs only where it is measured to be faster still."""
    paths = list(dict.fromkeys(part.decision.path for part in plan.ranges))
    return [path for path in paths if path is not Path.BF16 or Path.W8A16 not in paths]
