"""register() behind transformers' own expert parallelism: two ranks over gloo, weights that are DTensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.distributed.expert_parallel")

from epfuse.parallel.launch import Placement, RankContext, launch_ranks
from tests.integrations.test_transformers_families import experts_of

RANKS = 2
EXPERTS = 6
HIDDEN = 8


def layer() -> Any:
    sizes = dict.fromkeys(("num_experts", "num_local_experts"), EXPERTS)
    block: Any = torch.nn.ModuleDict({"experts": experts_of("qwen3_moe.Qwen3MoeExperts", **sizes)})
    return block.requires_grad_(False)


def batch(seed: int, tokens: int, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids of the first ``experts`` experts, weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(2).indices
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, 2, generator=generator)


FORMS = [("all_reduce", False), ("all_to_all", False), ("all_to_all", True), ("auto", False)]
"""transformers' name, and whether each rank has a batch of its own."""


def compute(context: RankContext) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [compute_form(context, *form) for form in FORMS]


def compute_form(context: RankContext, form: str, own_batch: bool) -> dict[str, Any]:
    """One rank: eager on all experts beside epfuse on its share, for batches that both ranks have or each its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    from epfuse.integrations.transformers import interface, register

    seen: list[tuple[int, int, int]] = []
    checks: Counter[int] = Counter()
    right, check = interface.fused_experts, interface.check_in_place

    def counted(hidden: torch.Tensor, weights: Any, factors: torch.Tensor, ids: torch.Tensor, *args: Any, **more: Any):
        seen.append((*ids.shape, weights.local_experts))
        return right(hidden, weights, factors, ids, *args, **more)

    def checked(name: str, module: Any) -> None:
        checks[id(module)] += 1
        check(name, module)

    register()
    whole, split = layer(), layer()
    split["experts"].config._experts_implementation = "epfuse"
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("ep", "alone"))
    plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm"}
    plan["experts"] = "ep_dispatch_experts"
    apply_expert_parallelism(split, mesh["ep"], mesh["alone" if own_batch else "ep"], plan, ep_implementation=form)
    before = split["experts"].gate_up_proj
    errors = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(interface, "fused_experts", counted)
        patch.setattr(interface, "check_in_place", checked)
        # 1 token: fewer than ranks; experts 0 to 2 alone: rank 1 gets no row; the last once more
        for tokens, experts in ((24, EXPERTS), (1, EXPERTS), (5, EXPERTS // 2), (5, EXPERTS // 2)):
            operands = batch(10 * tokens + own_batch * context.group.rank, tokens, experts)
            errors.append(float((split["experts"](*operands) - whole["experts"](*operands)).abs().max()))
    return {
        "errors": errors,
        "seen": seen,
        "checks": list(checks.values()),
        "kind": type(before).__name__,
        "restored": split["experts"].gate_up_proj is before,
    }


def test_two_ranks_add_up_to_the_layer(tmp_path: Path) -> None:
    ranks = launch_ranks(compute, (), ranks=RANKS, placement=Placement.CPU, log_dir=tmp_path)
    for (form, own_batch), *results in zip(FORMS, *ranks, strict=True):
        for result in results:
            assert max(result["errors"]) < 1e-4, (form, own_batch, result)
            assert len(result["seen"]) == 4, f"{form}: a rank did not run on epfuse"
            assert {local for _, _, local in result["seen"]} == {EXPERTS // RANKS}
            assert {width for _, width, _ in result["seen"]} == {1 if form == "all_to_all" else 2}
            assert result["checks"] == [1], f"{form}: the module was examined again at a later call"
            assert result["kind"] == "DTensor"
            assert result["restored"]
        if form == "all_to_all":  # rank 1 without a row: transformers hands one over, and drops its result
            rows = [result["seen"][2][0] for result in results]
            assert rows == [20 if own_batch else 10, 1]
