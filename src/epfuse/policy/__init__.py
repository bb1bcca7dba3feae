"""The oracle: how a layer keeps its weights, which path a call takes, with which tiles, and why.

Two questions, asked at two times. `plan_layer`, at load: what is stored, and which path serves which token counts.
`decide`, at a call: the kernels on the weights that are there.
"""

from epfuse.families.family import CallKind
from epfuse.families.registry import FP8_PATHS, READABLE, readable_formats
from epfuse.policy.call import decide
from epfuse.policy.decision import Considered, Decision, PathVerdict, TileChoice
from epfuse.policy.facts import LayerFacts, model_facts
from epfuse.policy.layer import LayerPlan, LayerRequest, Storage, TokenRange
from epfuse.policy.plan import plan_layer
from epfuse.policy.refusals import refusal
from epfuse.weights.checkpoint_format import Checkpoint

__all__ = [
    "FP8_PATHS",
    "READABLE",
    "CallKind",
    "Checkpoint",
    "Considered",
    "Decision",
    "LayerFacts",
    "LayerPlan",
    "LayerRequest",
    "PathVerdict",
    "Storage",
    "TileChoice",
    "TokenRange",
    "decide",
    "model_facts",
    "plan_layer",
    "readable_formats",
    "refusal",
]
