"""plan_layer(): the one entry of all policies."""

from __future__ import annotations

from collections.abc import Callable

from epfuse.arguments import checks_enums
from epfuse.config import Policy
from epfuse.environment import environment
from epfuse.policy import auto, seed_1782
from epfuse.policy.layer import LayerPlan, LayerRequest

PLANNERS: dict[Policy, Callable[[LayerRequest], LayerPlan]] = {
    Policy.AUTO: auto.plan,
    Policy.SEED_1782: seed_1782.plan,
}


@checks_enums
def plan_layer(request: LayerRequest, policy: Policy | None = None) -> LayerPlan:
    """How one layer keeps its weights, and which path serves which token counts; at load, once a layer.

    Args:
        request: the layer and where it runs.
        policy: None means the environment's (EPFUSE_POLICY), else AUTO.

    Raises:
        ConfigError: no storage that the policy may choose can be made or fits; or ``request.stored`` is UNTOUCHED.
        UnsupportedTarget: what is stored has no kernel on the target.
    """
    return PLANNERS[environment().policy if policy is None else policy](request)
