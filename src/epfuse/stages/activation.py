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
def gelu_tanh(gate, up):
    """FP32 gelu(gate) * up by tanh's approximation: (1 + tanh(z)) / 2 is sigmoid(2z), which loses nothing near -1."""
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * inner) * up


@triton.jit
def softcap(x, cap):
    """FP32 cap * tanh(x / cap). Near 0 by tanh's series, where a difference of ones would leave few bits."""
    z = x / cap
    square = z * z
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return cap * tl.where(tl.abs(z) < 0.25, z * series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def softcapped_swiglu(gate, up, activation):
    """FP32 softcap(gate) * sigmoid(gate) * softcap(up)."""
    gate_cap, up_cap = activation
    return softcap(gate, gate_cap) * tl.sigmoid(gate) * softcap(up, up_cap)


@triton.jit
def relu2(x):
    """FP32 max(x, 0) ** 2; a comparison, so that a NaN stays a NaN."""
    positive = tl.where(x < 0.0, 0.0, x)
    return positive * positive


@triton.jit
def activate(gate, up, activation, ACTIVATION: tl.constexpr, ONE_DIVISION: tl.constexpr = False):
    """One activated FP32 value for each pair of a gate and an up value, or for ``gate`` where ``up`` is None.

    ONE_DIVISION: as Hopper's kernels round.
    """
    if ACTIVATION == "swiglu_oai":
        return swiglu_oai(gate, up, activation, ONE_DIVISION)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(gate, up)
    elif ACTIVATION == "softcapped_swiglu":
        return softcapped_swiglu(gate, up, activation)
    elif ACTIVATION == "relu2":
        return relu2(gate)
    else:
        tl.static_assert(False, "no device code for this activation")
