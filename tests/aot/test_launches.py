"""What is compiled is what is launched: the tiles of the tables, and the specialisation that Triton makes at a call."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from epfuse import ExpertWeights
from epfuse.aot.calls import SHAPES, calls, token_counts
from epfuse.aot.tasks import Job, list_jobs, start
from epfuse.config import Combine, Path, WeightFormat
from epfuse.families.family import CallKind
from epfuse.policy import READABLE, decide
from epfuse.target import COMPUTE_UNITS, Target, compute_units, planning_for, target_of

META = torch.device("meta")


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """The launches of BF16 and W8A8 on gfx942, from a process that doesn't interpret."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        return pool.submit(list_jobs, Target.GFX942, [Path.BF16, Path.W8A8], ["minimax-m3"], ["bf16"]).result()


def test_every_tile_is_there(jobs: list[Job]) -> None:
    for stage in ("gate_up", "down"):
        compiled = {
            tuple(dict(job.launch.constants)[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            for job in jobs
            if job.launch.stage == stage and not job.compare and "bf16" in job.use.paths
        }
        chosen = set()
        for tokens in range(1, 5000):
            tiles = decide(CallKind(Path.BF16, Target.GFX942, SHAPES["minimax-m3"]), tokens).tiles
            assert tiles is not None
            tile = getattr(tiles, stage)
            chosen.add((tiles.block_m, tile.block_n, tile.block_k))
        assert compiled == chosen


def test_stages_of_a_call(jobs: list[Job]) -> None:
    stages = {
        path: {job.launch.stage for job in jobs if path in job.use.paths and not job.compare}
        for path in ("bf16", "w8a8")
    }
    assert stages["bf16"] == {"route", "gate_up", "down", "combine"}
    assert stages["w8a8"] == {"route", "quantize", "gate_up", "activate", "down", "combine"}
    assert [job.launch.stage for job in jobs if job.compare] == ["seed"]


def test_arguments_are_specialised(jobs: list[Job]) -> None:
    launch = next(job.launch for job in jobs if job.launch.stage == "gate_up" and "bf16" in job.use.paths)
    known = {name: dict(pairs) for name, pairs in launch.attributes}
    assert known["w13"] == {"tt.divisibility": 16, "tt.pointer_range": 32}  # 1.2 GB: buffer instructions can reach it
    assert known["H"] == {"tt.divisibility": 16}
    assert dict(launch.constants)["w13_scale"] is None
    assert dict(launch.signature)["R"] == "i32"
    assert "extern_libs" not in dict(launch.options)  # paths of this machine


def test_every_format_has_weights() -> None:
    for form in WeightFormat:
        assert set(ExpertWeights.without_data(form, SHAPES["gpt-oss-120b"]).kept) == {form}


@pytest.mark.parametrize("target", [Target.SM90, Target.GFX942, Target.GFX950])
def test_calls_reach_every_path_and_format(target: Target) -> None:
    found = calls(target, list(READABLE[target]), list(SHAPES), ["bf16", "fp32"])
    assert {(call.path, call.form) for call in found} == {
        (path, form) for path, forms in READABLE[target].items() for form in forms
    }
    assert {call.combine for call in found if call.path is Path.W8A8} == set(Combine)
    assert {call.dtype for call in found if call.form is not WeightFormat.DENSE} == {"bf16"}


def test_token_counts_reach_both_ends_of_every_tile() -> None:
    shape = SHAPES["minimax-m3"]
    counts = set(token_counts(CallKind(Path.BF16, Target.GFX942, shape)))
    assert {2**power for power in range(15)} <= counts
    tiles = [decide(CallKind(Path.BF16, Target.GFX942, shape), tokens).tiles for tokens in range(1, 5001)]
    changes = {tokens for tokens in range(1, 5000) if tiles[tokens - 1] != tiles[tokens]}
    assert changes
    assert counts - {2**power for power in range(15)} <= changes | {tokens + 1 for tokens in changes} <= counts


def test_the_meta_device_is_a_target_only_inside() -> None:
    with planning_for(Target.GFX942):
        assert target_of(META) is Target.GFX942
        assert compute_units(META) == COMPUTE_UNITS[Target.GFX942]
        with planning_for(Target.SM90):
            assert target_of(META) is Target.SM90
        assert target_of(META) is Target.GFX942
    with pytest.raises(ValueError, match="'meta'"):
        target_of(META)


def _given(scratch: bool) -> list[tuple[str, object]]:
    """Of Hopper calls with few and with many rows: what combine and gather are told of memory, and down of its rows."""
    from epfuse.aot.launches import launches_of
    from epfuse.expert_map import ExpertMap
    from epfuse.families import memory
    from epfuse.families.registry import family_of
    from epfuse.scratch import Scratch
    from epfuse.stages.combine import launch as combine
    from epfuse.stages.gate_up_down import kernel_sm90
    from epfuse.stages.gather import launch as gather
    from epfuse.tuning.calls import layer_call

    memory.overlaps = lambda first, second: True  # a server's scratch may have out's memory; tensors without data can't
    shape, form = SHAPES["minimax-m3"], WeightFormat.FRAGMENT
    weights = ExpertWeights.without_data(form, shape)
    slots = ExpertMap.contiguous(shape.experts, shape.experts // shape.local_experts, 0)
    found: list[tuple[str, object]] = []

    class Noted:
        def __init__(self, kernel, name):
            self.kernel, self.place = kernel, kernel.arg_names.index(name)

        def __getitem__(self, grid):
            return lambda *arguments, **_: found.append((self.kernel.__name__, arguments[self.place]))

    combine.combine_kernel = Noted(combine.combine_kernel, "out_is_free")
    gather.gather_kernel = Noted(gather.gather_kernel, "lone_stored")
    kernel_sm90.gate_up_down_sm90_kernel = Noted(kernel_sm90.gate_up_down_sm90_kernel, "lone_token")

    def call() -> None:
        for tokens in (64, 4096):
            tiles = decide(CallKind(Path.W8A16, Target.SM90, shape, frozenset({form})), tokens).tiles
            assert tiles is not None
            hidden, out = (torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=META) for _ in range(2))
            ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device=META)
            rows = Scratch(hidden.repeat(shape.top_k, 1), hidden.repeat(shape.top_k, 1)) if scratch else None
            router = torch.empty(ids.shape, device=META)
            call = layer_call(form, weights, hidden, router, ids, slots)._replace(out=out, scratch=rows)
            for _, launch in family_of(Path.W8A16, form, tiles).steps(call, tiles).launches:
                launch()

    launches_of(Target.SM90, call)
    return [(name, value is not None if name.startswith("gate_up_down") else value) for name, value in found]


@pytest.mark.parametrize("scratch", [True, False])
def test_nothing_is_stored_early_in_memory_that_y_may_have(scratch: bool) -> None:
    """Where scratch brings y and out lies in it. Run-time arguments: the kernels are the same."""
    free = int(not scratch)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        few, rows, gemms, many = pool.submit(_given, scratch).result()
    assert few == many == ("combine_kernel", free)
    assert rows == ("gather_kernel", free)
    assert gemms == ("gate_up_down_sm90_kernel", True)


def _largest_routing_code(target: Target) -> int:
    """Lines of intermediate code of the largest routing kernel of 128 local experts."""
    from epfuse.aot.launches import launches_of
    from tests.cases import routed

    def call() -> None:
        slots = torch.empty(128, dtype=torch.int32, device=META)
        for tokens in (64, 8192):
            for block_m in (128, 320):
                routed(torch.empty(tokens, 8, dtype=torch.int32, device=META), slots, 128, block_m)

    launches = launches_of(target, call)
    assert {launch.kernel for launch in launches} == {"route_kernel", "count_kernel", "place_kernel"}
    return max(len(launch.compile().asm["llir"].splitlines()) for launch in launches)


@pytest.mark.parametrize("target", [Target.SM90, Target.GFX942, Target.GFX950])
def test_many_local_experts_take_no_minutes_to_compile(target: Target) -> None:
    """A tensor of experts by padding slots in place_kernel did: it had not ended after five."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        assert pool.submit(_largest_routing_code, target).result() < 20_000


def _constants_of_one_step() -> list[dict[str, object]]:
    """The constants of both FP8 GEMMs where each has one step of 128 columns."""
    from epfuse.aot.launches import launches_of
    from epfuse.config import LayerShape
    from epfuse.expert_map import ExpertMap
    from epfuse.families.registry import family_of
    from epfuse.stages.tiles import LayerTiles, Sm90PersistentTile
    from epfuse.tuning.calls import layer_call

    shape, form = LayerShape(hidden=96, intermediate=128, experts=8, local_experts=8, top_k=2), WeightFormat.ROW_FP8
    tile = Sm90PersistentTile(192, 128, 0, 4, 5, 1)
    tiles = LayerTiles(16, tile, tile)

    def call() -> None:
        hidden = torch.empty(20, shape.hidden, dtype=torch.bfloat16, device=META)
        ids = torch.empty(20, shape.top_k, dtype=torch.int32, device=META)
        weights, slots = ExpertWeights.without_data(form, shape), ExpertMap.contiguous(8, 1, 0)
        operands = layer_call(form, weights, hidden, torch.empty(ids.shape, device=META), ids, slots)
        for _, launch in family_of(Path.W8A8, form, tiles).steps(operands, tiles).launches:
            launch()

    found = launches_of(Target.SM90, call)
    return [dict(launch.constants) for launch in found if launch.stage in ("gate_up", "down")]


def test_one_step_is_no_constant() -> None:
    """ptxas of triton 3.6 made code of it whose products read outside of shared memory, on some tiles."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        constants = pool.submit(_constants_of_one_step).result()
    assert len(constants) == 2
    assert all("STEPS" not in found for found in constants)
