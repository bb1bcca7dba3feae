"""What AUTO becomes, and what is refused, on every target."""

from __future__ import annotations

import pytest
import torch

from epfuse import Combine, LayerShape, Path, Target
from epfuse.config import WeightFormat
from epfuse.errors import UnsupportedTarget
from epfuse.families.family import CallKind
from epfuse.policy import FP8_PATHS, READABLE, PathVerdict, decide

M3 = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4)
GPUS = [target for target in Target if target.is_gpu]
D, M, F, Z = WeightFormat.DENSE, WeightFormat.MXFP8, WeightFormat.FRAGMENT, WeightFormat.MXFP8_FNUZ
B, Y = WeightFormat.BLOCK_FP8, WeightFormat.BLOCK_FP8_FNUZ


@pytest.mark.parametrize(
    ("target", "formats", "path", "reads"),
    [
        (Target.SM90, {D}, Path.BF16, D),
        (Target.SM90, {M}, Path.W8A16, M),
        (Target.SM90, {F, D}, Path.W8A16, F),
        (Target.SM90, {B}, Path.BLOCK_FP8, B),
        (Target.GFX942, {M}, Path.W8A16, M),
        (Target.GFX942, {Z, D}, Path.W8A16, Z),
        (Target.GFX942, {Y}, Path.BLOCK_FP8, Y),
        (Target.GFX950, {M, D}, Path.W8A16, M),
        (Target.CPU, {M}, Path.W8A16, M),
        (Target.CPU, {B}, Path.W8A16, B),
        (Target.CPU, {F}, Path.REFERENCE, None),
    ],
)
def test_auto(target: Target, formats: set[WeightFormat], path: Path, reads: WeightFormat | None) -> None:
    decision = decide(CallKind(Path.AUTO, target, M3, frozenset(formats)), 64)
    assert (decision.path, decision.weights) == (path, reads)
    assert (decision.tiles is None) == (reads is None)


@pytest.mark.parametrize("target", GPUS)
def test_auto_takes_quantised_activations_only_where_atomics_ask_for_them(target: Target) -> None:
    formats = READABLE[target][Path.W8A8]
    assert decide(CallKind(Path.AUTO, target, M3, frozenset(formats)), 64).path is Path.W8A16
    assert decide(CallKind(Path.AUTO, target, M3, frozenset(formats), combine=Combine.ATOMIC), 64).path is Path.W8A8


@pytest.mark.parametrize("tokens", [1, 64, 512, 2048, 32768])
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("path", sorted(FP8_PATHS, key=lambda path: path.value))
def test_tiles_of_fp8_paths_hold_whole_groups(target: Target, path: Path, tokens: int) -> None:
    tiles = decide(CallKind(path, target, M3, frozenset(READABLE[target][path])), tokens).tiles
    assert tiles.gate_up.block_k % 128 == tiles.down.block_k % 128 == 0


@pytest.mark.parametrize(
    ("path", "target", "formats", "dtype", "words"),
    [
        (Path.W8A8, Target.GFX942, {M}, torch.bfloat16, "gfx942 with weights in mxfp8; it can run w8a16, reference"),
        (Path.W8A8, Target.SM90, {F}, torch.bfloat16, "weights in fragment; it can run w8a16, reference"),
        (Path.W8A8, Target.SM90, {Z}, torch.bfloat16, "weights in mxfp8_fnuz; it can run reference"),
        (Path.W8A16, Target.SM90, {M}, torch.float16, "weights in mxfp8, activations in float16; it can run reference"),
        (Path.AUTO, Target.SM90, {M}, torch.float16, "weights in mxfp8, activations in float16; it can run reference"),
        (Path.AUTO, Target.GFX950, {F}, torch.bfloat16, "weights in fragment; it can run reference"),
    ],
)
def test_what_is_refused(
    path: Path, target: Target, formats: set[WeightFormat], dtype: torch.dtype, words: str
) -> None:
    with pytest.raises(UnsupportedTarget) as caught:
        decide(CallKind(path, target, M3, frozenset(formats), dtype), 64)
    assert words in str(caught.value)


@pytest.mark.parametrize("path", [Path.BF16, Path.W8A16, Path.REFERENCE])
def test_paths_without_atomics_refuse_them(path: Path) -> None:
    with pytest.raises(UnsupportedTarget, match="combine 'atomic'; it can run w8a8"):
        decide(CallKind(path, Target.SM90, M3, frozenset({D, M}), combine=Combine.ATOMIC), 64)


def test_a_decision_costs_a_lookup() -> None:
    formats = frozenset({M, D})
    decision = decide(CallKind(Path.AUTO, Target.SM90, M3, formats), 64)
    assert decide(CallKind(Path.AUTO, Target.SM90, M3, formats), 63) is decision
    assert (
        decide(CallKind(Path.AUTO, Target.SM90, LayerShape(6144, 3072, 128, 16, 4), frozenset({D, M})), 64) is decision
    )


@pytest.mark.parametrize("target", list(Target))
def test_every_path_is_considered_with_a_sentence(target: Target) -> None:
    for tokens in (1, 64, 4096):
        decision = decide(CallKind(Path.AUTO, target, M3, frozenset({M, D})), tokens)
        assert {entry.path for entry in decision.considered} == set(Path) - {Path.AUTO}
        assert [entry.path for entry in decision.considered if entry.verdict is PathVerdict.TAKEN] == [decision.path]
        assert all(entry.reason.endswith(".") for entry in decision.considered)
        assert decision.reason
        assert len(decision.refused) == len(Path) - 2


@pytest.mark.parametrize("target", GPUS)
def test_tiles_follow_the_rows_per_expert(target: Target) -> None:
    keys = [decide(CallKind(Path.BF16, target, M3), tokens).tile_key for tokens in (1, 512, 8192)]
    assert len(set(keys)) == 3
    wider = LayerShape(6144, 3072, 256, 16, 4)
    assert (
        decide(CallKind(Path.BF16, target, wider), 1024).tile_key
        == decide(CallKind(Path.BF16, target, M3), 512).tile_key
    )
