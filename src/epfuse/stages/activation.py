"""What stands between the two GEMMs, as device code: for Triton's kernels and, inlined as it is, for Gluon's.

A kernel takes an activation as two arguments: ``activation``, the tuple of its parameters, and the constant
``ACTIVATION``, its `epfuse.config.Activation.kind`. A new kind is a branch of `activate`, an entry of
`epfuse.stages.activation_reference`, and the families that have it (`Family.activations`).
"""

import triton
import triton.language as tl


@triton.jit
def swiglu_oai(gate, up, activation, ONE_DIVISION: tl.constexpr):
    """FP32 SwiGLU-OAI. Comparisons, not min/max: a NaN stays a NaN instead of becoming the limit.

    ONE_DIVISION: gate / d instead of gate * (1 / d), a multiplication and a rounding less.
    """
    alpha, beta, limit = activation
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ONE_DIVISION:
        return gate / (1.0 + tl.exp(-(alpha * gate))) * (up + beta)
    return gate * tl.sigmoid(alpha * gate) * (up + beta)


@triton.jit
def activate(gate, up, activation, ACTIVATION: tl.constexpr, ONE_DIVISION: tl.constexpr = False):
    """One activated FP32 value for each pair of a gate and an up value. ONE_DIVISION: as Hopper's kernels round."""
    if ACTIVATION == "swiglu_oai":
        return swiglu_oai(gate, up, activation, ONE_DIVISION)
    else:
        tl.static_assert(False, "no device code for this activation")
