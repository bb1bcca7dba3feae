"""From a layer's facts to one outcome: ours with a plan, or the server's with a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epfuse.arguments import checks_enums
from epfuse.config import Bias, Policy
from epfuse.environment import environment
from epfuse.errors import ConfigError, UnsupportedTarget
from epfuse.policy import LayerFacts, LayerPlan, LayerRequest, Storage, plan_layer, refusal


@dataclass(frozen=True)
class Choice:
    """Who runs a layer's experts.

    Attributes:
        facts: the layer.
        plan: how epfuse runs it; None leaves it to the server.
        reason: one sentence.
    """

    facts: LayerFacts
    plan: LayerPlan | None
    reason: str

    @property
    def is_ours(self) -> bool:
        """Whether epfuse runs the layer."""
        return self.plan is not None


@checks_enums
def choose(facts: LayerFacts, policy: Policy | None = None) -> Choice:
    """Refusals first, then the policy.

    Args:
        facts: the layer.
        policy: None means the environment's (EPFUSE_POLICY), else `Policy.AUTO`.
    """
    reason = refusal(facts)
    if reason is not None:
        return Choice(facts, None, reason)
    try:
        plan = ask_policy(facts, environment().policy if policy is None else policy)
    except (ConfigError, UnsupportedTarget) as error:
        return Choice(facts, None, f"the policy has no plan: {error}")
    if plan.is_untouched:
        return Choice(facts, None, plan.reason)
    return Choice(facts, plan, plan.reason)


@checks_enums
def ask_policy(facts: LayerFacts, policy: Policy) -> LayerPlan:
    """The core's plan for one layer.

    Under `auto` MXFP8 weights get no BF16 copy: how much memory the server leaves for the KV cache is not known yet
    when layers are built.

    Raises:
        ConfigError, UnsupportedTarget: the policy has no plan for the layer.
    """
    assert facts.target is not None
    assert facts.shape is not None
    assert facts.activation is not None
    assert facts.checkpoint is not None
    request = LayerRequest(
        target=facts.target,
        shape=facts.shape,
        ep_size=facts.ep_size,
        max_model_len=facts.max_model_len,
        layer=facts.layer,
        moe_layers=(facts.layer,),
        activation=facts.activation,
        bias=Bias.ADDED if facts.has_bias else Bias.NONE,
        checkpoint=facts.checkpoint,
        shared_experts=facts.shared_experts,
        tp_size=facts.tp_size,
        device_name=facts.device_name,
        rival=facts.own_experts,
    )
    plan = plan_layer(request, policy)
    if policy is Policy.AUTO and plan.storage is Storage.HYBRID:
        return plan_layer(replace(request, stored=Storage.MXFP8), policy)
    return plan
