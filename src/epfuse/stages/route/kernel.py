"""Routing kernels: group local routes by expert, padded to BLOCK_M, without a host sync.

Every expert that isn't this rank's (remote, -1, out of range) falls into bin L, which nothing reads. BINS is a power of
two above L, PADDING one from BLOCK_M on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from epfuse.kernel_cache import cached

ZEROS = tl.constexpr(1024)  # arrival counters that a program clears at a time
PIECE = tl.constexpr(32)  # routes compared with a chunk at a time: AMD's scalar registers hold the truth values


@triton.jit
def local_slots(topk_ids, expert_map, routes, R, E, L: tl.constexpr):
    """Local slot of each route, L where there is none; never dereferences an id outside [0, E)."""
    ids = tl.load(topk_ids + routes, mask=routes < R, other=-1)  # compared as wide as they are: 2^32 is no expert 0
    known = (ids >= 0) & (ids < E)
    slots = tl.load(expert_map + tl.where(known, ids, 0), mask=known, other=-1)
    return tl.where((slots >= 0) & (slots < L), slots, L)


@triton.jit
def clear(arrivals, num_arrivals):
    """Zero the arrival counters, if there are any, all programs together."""
    if arrivals is not None:
        for first in range(tl.program_id(0) * ZEROS, num_arrivals, tl.num_programs(0) * ZEROS):
            counters = first + tl.arange(0, ZEROS)
            tl.store(arrivals + counters, tl.zeros_like(counters), mask=counters < num_arrivals)


@triton.jit
def rank_in_chunk(slots, topk_ids, expert_map, R, E, L: tl.constexpr, CHUNK: tl.constexpr):
    """For each route of this program's chunk, how many before it have its slot.

    The others' slots are looked up again: a tensor has no slices.
    """
    inside = tl.arange(0, CHUNK)
    rank = tl.zeros((CHUNK,), tl.int32)
    for first in tl.static_range(0, CHUNK, PIECE):
        others = first + tl.arange(0, PIECE)
        theirs = local_slots(topk_ids, expert_map, tl.program_id(0) * CHUNK + others, R, E, L)
        same = (slots[:, None] == theirs[None, :]) & (others[None, :] < inside[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    return rank


@triton.jit
def place(
    slots, rank, routes, total, before,
    sorted_routes, block_expert, block_row, num_padded, arrivals, R, num_arrivals,
    L: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, PADDING: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write this program's share of the table, from the global counts and the counts of the chunks before it.

    No tensor is as large as BINS times PADDING or a chunk: of 128 local experts it would take minutes to compile.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    total = tl.where(bins < L, total, 0)
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    ends = tl.cumsum(padded, 0)
    starts = ends - padded
    used = tl.sum(padded, 0)

    where = tl.gather(starts + before, slots, 0) + rank
    tl.store(sorted_routes + where, routes, mask=slots < L)

    # the padding of an expert's group: experts are dealt out over the programs
    for expert in range(pid, L, programs):
        pad = tl.sum(tl.where(bins == expert, starts + total, 0), 0) + tl.arange(0, PADDING)
        end = tl.sum(tl.where(bins == expert, ends, 0), 0)
        tl.store(sorted_routes + pad, tl.zeros_like(pad) + R, mask=pad < end)

    for first in range(pid * BLOCKS, used // BLOCK_M, programs * BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        owner = tl.sum((ends[None, :] <= (blocks * BLOCK_M)[:, None]).to(tl.int32), 1)
        tl.store(block_expert + blocks, owner, mask=blocks * BLOCK_M < used)
        # padding of the experts before
        padding = tl.sum(tl.where(bins[None, :] < owner[:, None], (padded - total)[None, :], 0), 1)
        tl.store(block_row + blocks, blocks * BLOCK_M - padding, mask=blocks * BLOCK_M < used)
    if pid == 0:
        tl.store(num_padded, used)
    clear(arrivals, num_arrivals)


@cached
@triton.jit(do_not_specialize=["R", "num_arrivals"])
def route_kernel(
    topk_ids, expert_map, sorted_routes, block_expert, block_row, num_padded, arrivals, R, E, num_arrivals,
    L: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, PADDING: tl.constexpr, COUNT: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One launch, a program per local expert: it counts every expert's routes, then places its own."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, R, COUNT):
        total += tl.histogram(local_slots(topk_ids, expert_map, first + tl.arange(0, COUNT), R, E, L), BINS)
    total = tl.where(bins < L, total, 0)
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.sum(tl.where(bins < expert, padded, 0), 0)
    end = start + tl.sum(tl.where(bins == expert, padded, 0), 0)
    padding = tl.sum(tl.where(bins < expert, padded - total, 0), 0)  # of the experts before
    place = start
    for first in range(0, R, COUNT):
        routes = first + tl.arange(0, COUNT)
        mine = local_slots(topk_ids, expert_map, routes, R, E, L) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(sorted_routes + place + rank, routes, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    pad = place + tl.arange(0, PADDING)
    tl.store(sorted_routes + pad, tl.zeros_like(pad) + R, mask=pad < end)
    for first in range(start // BLOCK_M, end // BLOCK_M, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        tl.store(block_expert + blocks, tl.zeros_like(blocks) + expert, mask=blocks < end // BLOCK_M)
        tl.store(block_row + blocks, blocks * BLOCK_M - padding, mask=blocks < end // BLOCK_M)
    if expert == 0:
        tl.store(num_padded, tl.sum(padded, 0))
    clear(arrivals, num_arrivals)


@cached
@triton.jit(do_not_specialize=["R"])
def count_kernel(
    topk_ids, expert_map, counts, R, E,
    L: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First launch of the two: counts[chunk, bin]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    routes = pid * CHUNK + tl.arange(0, CHUNK)
    found = tl.histogram(local_slots(topk_ids, expert_map, routes, R, E, L), BINS)
    tl.store(counts + pid * BINS + tl.arange(0, BINS), found)


@cached
@triton.jit(do_not_specialize=["R", "num_arrivals"])
def place_kernel(
    topk_ids, expert_map, counts, sorted_routes, block_expert, block_row, num_padded, arrivals, R, E, num_arrivals,
    L: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, PADDING: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second launch: each program sums the counts, ROWS chunks at a time, then places its own routes."""
    pid = tl.program_id(0)
    chunks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    routes = pid * CHUNK + tl.arange(0, CHUNK)
    slots = local_slots(topk_ids, expert_map, routes, R, E, L)
    rank = rank_in_chunk(slots, topk_ids, expert_map, R, E, L, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, ROWS):
        rows = first + tl.arange(0, ROWS)
        found = tl.load(counts + rows[:, None] * BINS + bins[None, :], mask=(rows < chunks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((rows < pid)[:, None], found, 0), 0)
    place(
        slots, rank, routes, total, before,
        sorted_routes, block_expert, block_row, num_padded, arrivals, R, num_arrivals,
        L, BINS, BLOCK_M, PADDING, BLOCKS,
    )  # fmt: skip
