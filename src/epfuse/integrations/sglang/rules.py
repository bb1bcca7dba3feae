"""Which of SGLang's layers epfuse runs: what only SGLang has to say beside the policy; nothing of SGLang is imported.

The plugin asks these rules of SGLang's objects, `epfuse sglang explain` of a model's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from epfuse.arguments import checks_enums
from epfuse.config import Policy
from epfuse.integrations.choice import Choice, choose
from epfuse.policy import LayerFacts
from epfuse.target import Target
from epfuse.weights.checkpoint_format import Checkpoint

NAME = "epfuse"
"""Of the MoE runner: ``--moe-runner-backend epfuse``."""
AUTO = "auto"
"""What SGLang's backend arguments are where the user names none."""
TRITON = "triton"
"""The runner that SGLang names by itself where it would take it anyway: for MiniMax-M3 on ROCm, and in BF16."""

CONVERTED = "block FP8 made of MXFP8"
"""What runs an MXFP8 layer on gfx942 if epfuse does not; a name of the policy's table of rivals."""
NATIVE = "SGLang's MXFP8 experts"
"""What runs one on gfx950."""
TRITON_CORE = "SGLang's TritonRunnerCore"
"""What runs a BF16 layer."""

FIELDS = {
    "no_combine": "asks for the rows of each expert; epfuse sums them.",
    "no_combine_keep_router_weight": "asks for the rows of each expert; epfuse sums them.",
    "use_tp_all_gather_activation": "splits the activation over ranks.",
    "silu_mul_keep_fp32": "is SGLang's for DeepGEMM only.",
}
"""Fields of MoeRunnerConfig that epfuse does not honour where they are true -> why."""
SWITCHES = (
    "enable_two_batch_overlap",
    "enable_single_batch_overlap",
    "enable_deterministic_inference",
    "enable_elastic_expert_backup",
    "elastic_ep_backend",
)
"""Server arguments that epfuse does not serve where they are given."""


@dataclass(frozen=True)
class Runner:
    """The MoE runner that is to run a layer.

    Attributes:
        name: as ``--moe-runner-backend`` has it.
        is_named: the user named it; false for ``auto`` and for what SGLang makes of that.
    """

    name: str = AUTO
    is_named: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is epfuse's, so that a layer that epfuse can't run is an error."""
        return self.name == NAME

    @property
    def is_open(self) -> bool:
        """Whether the policy may decide."""
        return self.name in (AUTO, TRITON) and not self.is_named


@dataclass(frozen=True)
class Offer:
    """One layer as SGLang builds it.

    Attributes:
        facts: for the policy.
        runner: what is to run it.
        fields: those of `FIELDS` that are true.
        switches: those of `SWITCHES` that are given.
        has_top_k: MoeRunnerConfig says how many experts a token visits.
        wrapper: class that wraps the layer's quantisation method; None for none.
        prefetch_ranks: ``--dwdp-size``: ranks that lend each other experts while serving.
    """

    facts: LayerFacts
    runner: Runner
    fields: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    has_top_k: bool = True
    wrapper: str | None = None
    prefetch_ranks: int = 1


@checks_enums
def rival_of(checkpoint: Checkpoint | None, target: Target | None, runner: Runner) -> str | None:
    """What of SGLang's would run a layer; None where nothing would, or the user asked for epfuse."""
    if runner.is_ours or (checkpoint is Checkpoint.MXFP8 and target in (Target.SM90, Target.CPU)):
        return None
    if checkpoint is Checkpoint.MXFP8:
        return CONVERTED if target is Target.GFX942 else NATIVE
    return TRITON_CORE


@checks_enums
def decide(offer: Offer, policy: Policy | None = None) -> Choice:
    """Who runs a layer.

    Args:
        offer: the layer.
        policy: None means the environment's (EPFUSE_POLICY), else `Policy.AUTO`.
    """
    reason = _refusal(offer)
    return Choice(offer.facts, None, reason) if reason is not None else choose(offer.facts, policy)


def why_it_stops(offer: Offer, choice: Choice) -> str | None:
    """Why the server can't start with this choice; None if it can.

    A layer that nobody can run is said when it is built: SGLang's own experts would fail later, or answer garbage.
    """
    if choice.is_ours:
        return None
    if offer.runner.is_ours:
        return f"--moe-runner-backend {NAME} can't run {offer.facts.name}: {choice.reason}"
    if offer.facts.checkpoint is Checkpoint.MXFP8 and offer.facts.target is Target.SM90:
        return f"SGLang has no MXFP8 experts for Hopper, and epfuse can't run {offer.facts.name}: {choice.reason}"
    return None


@checks_enums
def makes_linears_bf16(is_mxfp8: bool, target: Target | None, backend: str) -> bool:
    """Whether MXFP8 linear layers become BF16 at load: on Hopper, unless the user named a kernel for them.

    Args:
        is_mxfp8: whether the checkpoint has them in MXFP8.
        target: the GPU.
        backend: ``--fp8-gemm-backend``.
    """
    return is_mxfp8 and target is Target.SM90 and backend == AUTO


def _refusal(offer: Offer) -> str | None:
    runner = offer.runner
    reasons = (
        (
            not (runner.is_ours or runner.is_open),
            f"--moe-runner-backend is {runner.name} ({'given' if runner.is_named else 'SGLang chose it'}); ask for"
            f" {NAME}.",
        ),
        (offer.wrapper is not None, f"{offer.wrapper} wraps the layer's method."),
        *((True, f"MoeRunnerConfig.{field} {FIELDS[field]}") for field in offer.fields),
        (not offer.has_top_k, "MoeRunnerConfig.top_k is not given."),
        (offer.facts.has_bias, "the experts have biases, which epfuse does not add in SGLang."),
        *((True, f"--{name.replace('_', '-')} is on, which epfuse does not serve.") for name in offer.switches),
        (
            offer.prefetch_ranks > 1,
            f"--dwdp-size {offer.prefetch_ranks} puts other ranks' experts into the layer while serving.",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)
