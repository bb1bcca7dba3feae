"""Judge a run: every tolerance, and where it comes from."""

from __future__ import annotations

from epfuse.demo.record import CheckVerdict, DemoCheck, LayerRecord, LogitsRecord, RankRecord, TrueSizeRecord

# A maximum over 10^4..10^5 elements moves by tens of percent with the order of a sum; a lost or doubled route moves it
# by orders of magnitude.
LAYER_HEADROOM = 4.0
# Two programs that both round like the untouched model stand sqrt(2) of its rounding noise apart.
LOGITS_HEADROOM = 1.5
# Roundings to BF16 between the accumulators and the output: gate and up, the activation, the weighted row.
BF16_ROUNDINGS = 3
BF16_UNIT = 2.0**-8


def judge(
    layers: list[LayerRecord],
    logits: LogitsRecord,
    ranks: list[RankRecord],
    expected: list[int],
    dtype: str,
    true_size: TrueSizeRecord | None,
) -> list[DemoCheck]:
    """All checks of a run.

    Args:
        layers: every MoE layer over all ranks.
        logits: the worst rank's.
        ranks: what each rank returned.
        expected: the untouched model's greedy tokens.
        dtype: the run's; in bfloat16 the tokens are not required to agree.
        true_size: the layer at true size; None where there is no GPU.
    """
    checks = []
    for layer in layers:
        allowed = LAYER_HEADROOM * layer.transformers_error
        why = f"{LAYER_HEADROOM:g} x the error of transformers' own experts in {dtype} against float64"
        checks.append(at_most(f"{layer.label}: ranks' sum = transformers' experts", layer.error, allowed, why))
        checks.append(
            at_most(f"{layer.label}: ranks' sum = epfuse on one rank", layer.unsharded_distance, allowed, why)
        )
        lost = abs(sum(layer.useful_rows) - layer.routes)
        checks.append(at_most(f"{layer.label}: each route runs on one rank", lost, 0, "exact"))
    noise = f"{LOGITS_HEADROOM:g} x the untouched model's own {dtype} rounding noise (RMS, against float64)"
    checks.append(at_most("logits = the untouched model's", logits.rms, LOGITS_HEADROOM * logits.noise, noise))
    checks.append(tokens_agree(ranks, expected, dtype))
    strays = sum(rank.tokens != ranks[0].tokens for rank in ranks)
    checks.append(at_most("every rank generates the same tokens", strays, 0, "exact"))
    if true_size is not None:
        allowed = BF16_ROUNDINGS * BF16_UNIT * true_size.scale
        why = f"{BF16_ROUNDINGS} roundings to BF16 of the largest output"
        checks.append(at_most("one layer at true size = float64", true_size.error, allowed, why))
    return checks


def at_most(name: str, measured: float, allowed: float, why: str) -> DemoCheck:
    """``measured <= allowed``; NaN fails."""
    return DemoCheck(name, CheckVerdict.PASSED if measured <= allowed else CheckVerdict.FAILED, measured, allowed, why)


def tokens_agree(ranks: list[RankRecord], expected: list[int], dtype: str) -> DemoCheck:
    """Greedy tokens equal the untouched model's: required in float32.

    In bfloat16 router scores tie within their own rounding, two correct programs pick different experts, and one such
    token changes everything that is generated after it. The check there is the noise of the logits, which has the same
    cause.
    """
    wrong = sum(got != want for got, want in zip(ranks[0].tokens, expected, strict=True))
    if dtype == "float32":
        return at_most("greedy tokens = the untouched model's", wrong, 0, "exact")
    why = "bfloat16 router scores tie; both models may choose differently"
    return DemoCheck("greedy tokens = the untouched model's", CheckVerdict.INFORMATIVE, wrong, None, why)
