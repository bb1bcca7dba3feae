"""Which measured row a call uses, how far it is from it, and that nothing of it is silent."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch
from pydantic import ValidationError

from epfuse import LayerShape, Path, Target
from epfuse.config import GPT_OSS_20B, Bias, WeightFormat
from epfuse.families.family import CallKind, Stage
from epfuse.families.registry import FAMILIES, default_ranges
from epfuse.measured import store
from epfuse.measured.lookup import LayerMeasurements, find, sources
from epfuse.measured.schema import TileRow
from epfuse.policy import Decision, decide
from epfuse.policy.call import running_table
from epfuse.stages.tiles import rows_per_expert
from tests.tuning.tables import H100, H200, M3, measurement, row, write

DENSE = WeightFormat.DENSE


def found(tokens: int, device: str = H100, shape: LayerShape = M3) -> tuple[LayerMeasurements, int, float] | None:
    answer = find(sources(Target.SM90, device, Path.BF16, DENSE, shape), tokens * shape.top_k / shape.experts)
    return None if answer is None else (answer.source, answer.point.tokens, answer.factor)


def decided(tokens: int, device: str = H100, shape: LayerShape = M3, dtype: torch.dtype = torch.bfloat16) -> Decision:
    return decide(CallKind(Path.BF16, Target.SM90, shape, dtype=dtype, device_name=device), tokens)


def test_the_nearest_row_in_rows_per_expert_is_used(tables: FilePath) -> None:
    write(tables, measurement(row(16), row(64), row(1024)))
    for tokens, used in {8: 16, 16: 16, 31: 16, 33: 64, 128: 64, 512: 1024, 2048: 1024}.items():
        answer = found(tokens)
        assert answer is not None
        assert answer[1] == used
        assert answer[2] == pytest.approx(max(tokens / used, used / tokens))


def test_a_row_whose_block_is_too_small_for_the_call_gives_way_to_the_next(tables: FilePath) -> None:
    write(tables, measurement(row(256, block_m=16), row(1024, block_m=64)))
    # a block of 16 holds 12.5 expected rows with their scatter, which is T = 400; from 512 on the next is near
    for tokens, used in {128: 256, 399: 256, 512: 1024, 520: 1024, 2048: 1024}.items():
        answer = found(tokens)
        assert answer is not None
        assert answer[1] == used
    assert found(420) is None


def test_a_row_whose_block_was_too_small_when_it_was_measured_stays(tables: FilePath) -> None:
    write(tables, measurement(row(1024, block_m=16)))
    answer = found(1500)
    assert answer is not None
    assert answer[1] == 1024


@pytest.mark.parametrize("tokens", [7, 129, 511, 2049])
def test_a_far_row_is_not_used(tables: FilePath, tokens: int) -> None:
    write(tables, measurement(row(16), row(64), row(1024)))
    assert found(tokens) is None
    assert decided(tokens).measured_us is None
    assert "no measured row is near (T=16, 64, 1024 on NVIDIA H100" in decided(tokens).tile_source


def test_a_decision_says_which_row_and_how_far(tables: FilePath) -> None:
    write(tables, measurement(row(64, block_n=32)))
    decision = decided(100)
    assert decision.tiles is not None
    assert decision.tiles.gate_up.block_n == 32
    assert decision.measured_us == 20.0
    assert decision.tile_source == (
        "A tuned row, measured at T=64 on NVIDIA H100 80GB HBM3, 2026-11-24; calls are within a factor of 2.00."
    )


def test_decisions_change_exactly_where_the_rows_do(tables: FilePath) -> None:
    write(tables, measurement(row(16), row(64), row(1024)))
    for tokens in range(1, 3000):
        answer = found(tokens)
        used = decided(tokens).measured_us
        assert (answer is None) == (used is None)
        if answer is not None:
            assert f"T={answer[1]} on" in decided(tokens).tile_source


def test_the_block_m_that_is_best_for_both_stages_together_is_used(tables: FilePath) -> None:
    gate_up = measurement(row(64, 16, 10.0), row(64, 32, 12.0))
    down = measurement(row(64, 16, 9.0), row(64, 32, 6.0))
    store.merge(tables, Target.SM90, {Stage.GATE_UP: gate_up, Stage.DOWN: down})
    decision = decided(64)
    assert decision.tiles is not None
    assert (decision.tiles.block_m, decision.measured_us) == (32, 18.0)


def test_a_whole_calls_time_counts_more_than_its_stages(tables: FilePath) -> None:
    rows = (row(64, 16, 10.0, layer_microseconds=30.0), row(64, 32, 12.0, layer_microseconds=25.0))
    write(tables, measurement(*rows))
    decision = decided(64)
    assert decision.tiles is not None
    assert (decision.tiles.block_m, decision.measured_us) == (32, 25.0)


def test_a_row_of_whole_calls_alone_is_used_by_their_time(tables: FilePath) -> None:
    alone = row(64, 16).model_copy(update={"microseconds": None, "roofline": None, "layer_microseconds": 24.0})
    write(tables, measurement(alone, row(64, 32, 12.0, layer_microseconds=25.0)))
    decision = decided(64)
    assert decision.tiles is not None
    assert (decision.tiles.block_m, decision.measured_us) == (16, 24.0)


def test_halves_of_different_whole_calls_are_no_row(tables: FilePath) -> None:
    rows = [
        row(64, 16).model_copy(update={"microseconds": None, "roofline": None, "layer_microseconds": us})
        for us in (24.0, 26.0)
    ]
    store.merge(tables, Target.SM90, {Stage.GATE_UP: measurement(rows[0]), Stage.DOWN: measurement(rows[1])})
    assert decided(64).measured_us is None


@pytest.mark.parametrize(
    ("left_out", "said"),
    [(("microseconds",), "go together"), (("microseconds", "roofline"), "neither the stage nor a whole call")],
)
def test_a_row_without_a_time_is_refused(left_out: tuple[str, ...], said: str) -> None:
    values = row(64, 16).model_dump(mode="json") | dict.fromkeys(left_out)
    with pytest.raises(ValidationError, match=said):
        TileRow.model_validate(values)


def test_another_product_of_the_target_is_foreign_and_said_so(
    tables: FilePath, caplog: pytest.LogCaptureFixture
) -> None:
    write(tables, measurement(row(64)))
    with caplog.at_level(logging.WARNING, "epfuse"):
        decision = decided(64, H200)
        assert not caplog.text  # who asks does not run it
        for _ in range(2):
            running_table(CallKind(Path.BF16, Target.SM90, M3, device_name=H200))
    assert len(caplog.records) == 1
    assert decision.tile_source.startswith("A foreign row, measured at T=64 on NVIDIA H100 80GB HBM3")
    assert decision.measured_us is None
    assert "bf16 (dense) on NVIDIA H200 (sm_90)" in caplog.text
    assert "'epfuse tune'" in caplog.text


def test_another_split_of_the_same_experts_is_foreign_and_compared_by_rows_per_expert(tables: FilePath) -> None:
    write(tables, measurement(row(64)))
    wider = replace(M3, experts=256)
    assert decided(128, shape=wider).tile_source.startswith("A foreign row, measured at T=64")
    assert "for E=128 L=16 K=4" in decided(128, shape=wider).tile_source
    assert "The default of sm_90" in decided(31, shape=wider).tile_source


def test_a_layer_with_biases_takes_the_tiles_and_not_the_time(
    tables: FilePath, caplog: pytest.LogCaptureFixture
) -> None:
    write(tables, measurement(row(64, block_n=32)))
    with caplog.at_level(logging.WARNING, "epfuse"):
        plain, biased = (
            decide(CallKind(Path.BF16, Target.SM90, M3, device_name=H100, bias=bias), 64)
            for bias in (Bias.NONE, Bias.ADDED)
        )
    assert (biased.tiles, biased.family) == (plain.tiles, plain.family)
    assert (plain.measured_us, biased.measured_us) == (20.0, None)
    assert biased.tile_source == (
        "A foreign row, measured at T=64 on NVIDIA H100 80GB HBM3, 2026-11-24, without biases; calls are within a"
        " factor of 2.00."
    )
    assert not caplog.text  # biases cost next to nothing


def test_rows_with_biases_serve_such_layers_first_and_others_last(tables: FilePath) -> None:
    write(
        tables,
        measurement(row(64, block_n=32), row(1024, block_n=32)),
        measurement(row(64, block_n=128, microseconds=11.0), bias=Bias.ADDED),
        measurement(row(256, block_n=128), row(1024, block_n=128), bias=Bias.ADDED, device=H200),
    )

    def at(tokens: int, bias: Bias) -> Decision:
        return decide(CallKind(Path.BF16, Target.SM90, M3, device_name=H100, bias=bias), tokens)

    plain, biased = at(64, Bias.NONE), at(64, Bias.ADDED)
    assert [one.tiles.gate_up.block_n for one in (plain, biased) if one.tiles is not None] == [32, 128]
    assert (plain.measured_us, biased.measured_us) == (20.0, 22.0)
    assert biased.tile_source.startswith("A tuned row, measured at T=64 on NVIDIA H100 80GB HBM3, 2026-11-24; ")
    # this product's row without biases before another product's with
    assert "T=1024 on NVIDIA H100 80GB HBM3, 2026-11-24, without biases" in at(1024, Bias.ADDED).tile_source
    other = at(256, Bias.NONE)
    assert other.measured_us is None
    assert "A foreign row, measured at T=256 on NVIDIA H200, 2026-11-24, with biases;" in other.tile_source


def test_sizes_count_for_more_than_biases(tables: FilePath) -> None:
    """Rows of a layer with biases and another number of experts come after those of the same sizes without."""
    half = replace(M3, local_experts=M3.local_experts // 2)
    write(
        tables,
        measurement(row(64, block_n=32)),
        measurement(row(64, block_n=128), bias=Bias.ADDED, shape=half),
    )
    found = decide(CallKind(Path.BF16, Target.SM90, M3, device_name=H100, bias=Bias.ADDED), 64)
    assert "without biases" in found.tile_source
    assert found.measured_us is None


def test_a_table_that_does_not_say_has_no_biases(tables: FilePath) -> None:
    write(tables, measurement(row(64)))
    path = store.table_path(tables, Target.SM90, Stage.DOWN)
    values = json.loads(path.read_text())
    assert values["measurements"][0].pop("bias") == "none"
    path.write_text(json.dumps(values))
    store.shipped.cache_clear()
    assert store.read_table(tables, Target.SM90, Stage.DOWN).measurements[0].bias is Bias.NONE
    assert decided(64).measured_us == 20.0


def test_every_family_adds_biases() -> None:
    """Or a row measured without them could choose one that would leave them out."""
    assert all(Bias.ADDED in family.biases for family in FAMILIES)


def test_gpt_oss_runs_in_the_tiles_of_its_layer_that_ship() -> None:
    shape, formats = GPT_OSS_20B, frozenset({WeightFormat.FRAGMENT})
    for tokens in (1, 64, 1024):
        kind = CallKind(Path.W8A16, Target.SM90, shape, formats, device_name="NVIDIA H200")
        biased = decide(replace(kind, bias=Bias.ADDED), tokens)
        assert biased.tiles == decide(kind, tokens).tiles
        assert "without biases" in biased.tile_source


@pytest.mark.parametrize(("local", "used"), [(4, False), (7, False), (8, True), (16, True), (64, True)])
def test_a_layer_with_many_more_local_experts_says_nothing(tables: FilePath, local: int, used: bool) -> None:
    write(tables, measurement(row(64)))  # of 16 local experts
    source = decided(64, shape=replace(M3, local_experts=local)).tile_source
    assert source.startswith("A foreign row" if used and local != 16 else "A tuned row" if used else "The default")


def test_the_own_device_comes_first_then_the_own_shape(tables: FilePath) -> None:
    ep4 = replace(M3, local_experts=32)
    write(
        tables,
        measurement(row(64), row(1024), shape=ep4, device=H200),
        measurement(row(64), device=H200),
        measurement(row(64), row(1024), row(8192)),
    )

    def used(tokens: int) -> tuple[str, LayerShape]:
        answer = found(tokens, H200)
        assert answer is not None
        return answer[0].device, answer[0].shape

    assert [used(tokens) for tokens in (64, 1024, 8192)] == [(H200, M3), (H200, ep4), (H100, M3)]


def test_a_gap_between_the_own_rows_is_filled_by_close_rows_of_others(tables: FilePath) -> None:
    write(tables, measurement(row(64), row(256), device=H200), measurement(row(64), row(128), row(256)))

    def used(tokens: int) -> tuple[str, int]:
        answer = found(tokens, H200)
        assert answer is not None
        return answer[0].device, answer[1]

    assert [used(tokens) for tokens in (64, 96, 97, 128, 170, 171, 256)] == [
        (H200, 64),
        (H200, 64),
        (H100, 128),
        (H100, 128),
        (H100, 128),
        (H200, 256),
        (H200, 256),
    ]
    assert used(33) == (H200, 64)  # nobody has a close one
    assert found(512, H200) is not None
    assert found(33, "NVIDIA H20") is None  # near, but another product's


@pytest.mark.parametrize("shape", [replace(M3, hidden=4096), replace(M3, intermediate=1536)])
def test_other_matrices_have_nothing_to_say(tables: FilePath, shape: LayerShape) -> None:
    write(tables, measurement(row(64)))
    assert sources(Target.SM90, H100, Path.BF16, DENSE, shape) == ()
    assert "nothing was measured for this H and I" in decided(64, shape=shape).tile_source


def test_other_dtypes_targets_and_paths_have_their_own_tiles(tables: FilePath) -> None:
    write(tables, measurement(row(64)))
    assert decided(64, dtype=torch.float16).measured_us is None
    assert decide(CallKind(Path.BF16, Target.GFX942, M3), 64).measured_us is None
    mxfp8 = frozenset({WeightFormat.MXFP8})
    assert decide(CallKind(Path.W8A16, Target.SM90, M3, mxfp8, device_name=H100), 64).measured_us is None


def test_defaults_stay_what_they_were_without_a_table(tables: FilePath) -> None:
    ranges = default_ranges(CallKind(Path.BF16, Target.SM90, M3, frozenset({DENSE})))
    for tokens in range(1, 5000):
        expected = next(entry.tiles for entry in ranges if rows_per_expert(tokens, M3) <= entry.max_rows)
        assert decided(tokens).tiles == expected
