"""Packed FP8 rows: bit for bit the reference's, one group a row or several, every local route's, nothing past them."""

from __future__ import annotations

import pytest
import torch

from epfuse.config import SwiGLUOAI
from epfuse.stages.activation_reference import swiglu_oai
from epfuse.stages.gather.launch import LoneTokens
from epfuse.stages.quantize.launch_packed import Bounds, launch_quantize_packed
from epfuse.stages.quantize.reference import quantize
from epfuse.stages.quantize.rows import FP8Rows
from tests.cases import ROUTINGS, first_experts, packed_routes, routed, topk_ids_for

LOCAL, EXPERTS, TOP_K = 5, 24, 4


def hard_rows(rows: int, columns: int) -> torch.Tensor:
    """Zeros, one huge value, subnormal numbers, NaN, infinity; the rest random at many magnitudes."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=g) * torch.logspace(-6, 6, rows)[torch.randperm(rows, generator=g), None]
    x[0] = 0
    x[1, 7] = 1e30
    x[2] = 1e-39
    x[3, columns - 1] = float("nan")
    x[4, 0] = float("-inf")
    x[5] = 448.0
    return x.bfloat16()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "columns", "block_m"), [(37, 96, 16), (300, 2880, 48)])
@pytest.mark.parametrize("packed_already", [False, True])
def test_rows_are_those_of_the_reference(device, tokens, columns, block_m, routing, packed_already):
    ids = topk_ids_for(routing, tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, block_m)
    order = packed_routes(routes)
    x = hard_rows(tokens * TOP_K if packed_already else tokens, columns).to(device)
    source = x[: order.numel()] if packed_already else x[order // TOP_K]
    out = FP8Rows.empty(tokens * TOP_K, columns, columns, torch.float8_e4m3fn, device)
    out.values.view(torch.uint8).fill_(0x55)
    out.scales.fill_(0x55)
    got = launch_quantize_packed(x, routes, None if packed_already else TOP_K, out)
    want = quantize(source.cpu(), group=columns)
    codes = got.values.view(torch.uint8).cpu()
    torch.testing.assert_close(codes[: order.numel()], want.values.view(torch.uint8), rtol=0, atol=0)
    torch.testing.assert_close(got.scales[: order.numel()].cpu(), want.scales, rtol=0, atol=0)
    assert (codes[order.numel() :] == 0x55).all()
    assert (got.scales[order.numel() :] == 0x55).all()


@pytest.mark.parametrize("columns", [96, 256, 352])
def test_rows_in_groups_are_those_of_the_reference(device, columns):
    """As block FP8 weights have them: a scale for 128 columns, the last group cut short."""
    tokens, group = 37, 128
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, 16)
    order = packed_routes(routes)
    x = hard_rows(tokens, columns).to(device)
    out = FP8Rows.empty(tokens * TOP_K, columns, group, torch.float8_e4m3fn, device)
    out.values.view(torch.uint8).fill_(0x55)
    out.scales.fill_(0x55)
    launch_quantize_packed(x, routes, TOP_K, out)
    want = quantize(x[order // TOP_K].cpu(), group=group)
    codes, scales = out.values.view(torch.uint8).cpu(), out.scales.cpu()
    torch.testing.assert_close(codes[: order.numel()], want.values.view(torch.uint8), rtol=0, atol=0)
    torch.testing.assert_close(scales[: order.numel()], want.scales, rtol=0, atol=0)
    assert (codes[order.numel() :] == 0x55).all()
    assert (scales[order.numel() :] == 0x55).all()


def test_where_each_row_is_and_which_are_their_tokens_only_one(device):
    tokens, columns = 37, 96
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, 16)
    route_row, of_row = (torch.full((tokens * TOP_K,), -7, dtype=torch.int32, device=device) for _ in range(2))
    x = hard_rows(tokens, columns).to(device)
    lone = LoneTokens(ids, slots, LOCAL, of_row, torch.empty_like(x), stored=True)
    launch_quantize_packed(x, routes, TOP_K, None, route_row, lone)
    order = packed_routes(routes)
    want = torch.full_like(route_row, -7)
    want[order] = torch.arange(order.numel(), dtype=torch.int32, device=device)
    torch.testing.assert_close(route_row, want, rtol=0, atol=0)
    token = order // TOP_K
    alone = torch.bincount(token, minlength=tokens)[token] == 1
    torch.testing.assert_close(of_row[: order.numel()], torch.where(alone, token, -1).int(), rtol=0, atol=0)
    assert (of_row[order.numel() :] == -7).all()


@pytest.mark.parametrize("activation", [SwiGLUOAI(), SwiGLUOAI(1.0, 2.0, 30.0)])
def test_scales_of_what_gate_up_will_make_hold_it_and_are_no_larger_than_the_lengths_say(device, activation):
    """Rows along the longest gate and up rows reach their bound; of zeros, NaN and infinity it is 0 and NaN."""
    tokens, columns = 37, 96
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, 16)
    owner = torch.cat([torch.full_like(found, expert) for expert, found in routes.groups()])
    order = packed_routes(routes)
    g = torch.Generator().manual_seed(1)
    along = torch.nn.functional.normalize(torch.randn(columns, generator=g), dim=0)
    size = torch.logspace(-3, 1, LOCAL)
    longest = torch.stack([size, 2 * size], 1).float().to(device)
    x = hard_rows(tokens, columns)
    x[6:] = (along * torch.logspace(-4, 2, tokens - 6)[:, None]).bfloat16()
    x[9] = 0
    x = x.to(device)
    scales = torch.full((tokens * TOP_K, 1), 0x55, dtype=torch.uint8, device=device)
    got = launch_quantize_packed(x, routes, TOP_K, bounds=Bounds(longest, activation, scales))
    rows, bytes_ = order.numel(), scales.flatten().cpu()
    numbers = got.dequantize(torch.float64)[:rows].cpu()
    lengths = numbers.norm(dim=1)[:, None] * longest.double().cpu()[owner.cpu()]
    bad = ~lengths.isfinite().all(1)
    assert bad.any()
    assert (bytes_[:rows][bad] == 255).all()
    assert (bytes_[rows:] == 0x55).all()
    lengths, held = lengths[~bad], 448 * torch.exp2(bytes_[:rows][~bad].double() - 127)
    largest = swiglu_oai(torch.cat([lengths, -lengths * torch.tensor([1.0, -1.0])]), activation).abs().flatten()
    assert (largest <= held.repeat(2)).all()
    gate, up = (lengths * 1.0625).clamp(max=activation.limit).T
    bound = gate * (up + activation.beta)
    assert (held >= bound * (1 - 1e-5)).all()
    assert ((held / 2 <= bound * (1 + 1e-5)) | (bytes_[:rows][~bad] == 0)).all()


def test_rows_of_codes_may_be_apart(device):
    tokens, columns = 37, 96
    ids = topk_ids_for("uniform", tokens, EXPERTS, LOCAL, TOP_K).to(device)
    slots = first_experts(EXPERTS, LOCAL, device)
    routes = routed(ids, slots, LOCAL, 16)
    x = hard_rows(tokens, columns).to(device)
    want = launch_quantize_packed(x, routes, TOP_K)
    memory = torch.full((tokens * TOP_K, 2 * columns), 0x55, dtype=torch.uint8, device=device)
    apart = FP8Rows(memory.view(torch.float8_e4m3fn)[:, :columns], torch.empty_like(want.scales), columns)
    launch_quantize_packed(x, routes, TOP_K, apart)
    rows = sum(found.numel() for _, found in routes.groups())
    assert torch.equal(memory[:rows, :columns], want.values.view(torch.uint8)[:rows])
    assert torch.equal(apart.scales[:rows], want.scales[:rows])
    assert (memory[:, columns:] == 0x55).all()
    assert (memory[rows:] == 0x55).all()
