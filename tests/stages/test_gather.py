"""The gather kernel: every local route's row, packed in the table's order, and nothing past them."""

from __future__ import annotations

import pytest
import torch

from epfuse.stages.gather.launch import LoneTokens, launch_gather
from tests.cases import ROUTINGS, first_experts, packed_routes, routed, topk_ids_for

LOCAL, EXPERTS, TOP_K = 5, 24, 4


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "hidden"), [(37, 96), (300, 2880)])
@pytest.mark.parametrize("stored", [True, False])
def test_gather(device, tokens, hidden, routing, stored):
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, 48)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    route_row, of_row = (torch.full((tokens * TOP_K,), -7, dtype=torch.int32, device=device) for _ in range(2))
    lone = LoneTokens(ids, slots, LOCAL, of_row, torch.empty_like(x), stored=stored)
    memory = torch.full((tokens * TOP_K, hidden), float("nan"), device=device).bfloat16()
    got = launch_gather(x, routes, TOP_K, memory, route_row, lone)
    order = packed_routes(routes)
    torch.testing.assert_close(got[: order.numel()], x[order // TOP_K], rtol=0, atol=0)
    assert got[order.numel() :].isnan().all()
    want = torch.full_like(route_row, -7)
    want[order] = torch.arange(order.numel(), dtype=torch.int32, device=device)
    torch.testing.assert_close(route_row, want, rtol=0, atol=0)
    token = order // TOP_K
    routes_of_token = torch.bincount(token, minlength=tokens)
    want = torch.where((routes_of_token[token] == 1) & stored, token, -1).int()
    torch.testing.assert_close(lone.of_row[: order.numel()], want, rtol=0, atol=0)
    assert (lone.of_row[order.numel() :] == -7).all()
