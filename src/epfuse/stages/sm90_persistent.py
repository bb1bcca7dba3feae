"""Hopper's kernels with one program per multiprocessor and specialised warps: tiles, and their rows in shared memory.

A producer (one warp) claims tiles and has the tensor copy engine fill a ring in shared memory; it runs ahead, into the
next tile too. Two or three consumers (a warpgroup each) multiply: each has one panel of the tile's weight rows and all
of its routed rows, and none waits for another.

The copy engine copies adjacent rows: the routed rows lie packed in the route table's order. What a tile copies past its
last row are rows of the next expert, for columns that are not stored.

The routed rows of a tile are one power of two, the head, or that and another one, the rest: 144 are 128 + 16, because
the rows of an expert scatter about their mean; 128 as 64 + 64 cost little more than 64 where there are no more, and
take half the blocks for an expert with many. The rest is copied and multiplied as far as it has rows, in a few steps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from epfuse.stages.sm90_layouts import powers
from epfuse.stages.tiles import FEW_ROWS

FEW = gl.constexpr(FEW_ROWS)
PANEL = gl.constexpr(64)  # weight rows of a consumer
TILE_SLOTS = gl.constexpr(2)


@gluon.constexpr_function
def column_steps(block_m, head):
    """What a tile can be multiplied with, ascending: (columns of the head, of the rest).

    Each costs a copy of the main loop. Large tiles are bound by the tensor cores, and a rest as large as the head is
    seldom full: so theirs are finer.
    """
    rest = block_m - head
    if rest == 0:
        return [(head // 2, 0), (head, 0)]
    large = head >= 256 and rest >= 32
    least = min(rest, FEW_ROWS) if large or rest >= head else rest
    return [(rest, 0)] * large + [(head, 0)] + [(head, more) for more in powers(least, rest + 1)]


@gluon.constexpr_function
def number_of_steps(block_m, head):
    """How many column_steps there are."""
    return len(column_steps(block_m, head))


@gluon.constexpr_function
def head_columns(block_m, head, step):
    """Columns of the head in one of column_steps."""
    return column_steps(block_m, head)[step][0]


@gluon.constexpr_function
def all_columns(block_m, head, step):
    """Columns of one of column_steps."""
    return sum(column_steps(block_m, head)[step])


@gluon.constexpr_function
def rest_columns(block_m, head, step):
    """Columns of the rest in one of column_steps."""
    return column_steps(block_m, head)[step][1]


@gluon.jit
def step_of(block_routes, R, BLOCK_M: gl.constexpr, HEAD: gl.constexpr):
    """The first of column_steps that has all routes of a block: padding comes last, and need not be multiplied."""
    step = 0
    for i in gl.static_range(number_of_steps(BLOCK_M, HEAD) - 1):
        step += (gl.load(block_routes + all_columns(BLOCK_M, HEAD, i)) < R).to(gl.int32)
    return step


@gluon.jit
def claim(counter):
    """The next tile of all programs'. By one warp."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane, got;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        mov.u32 got, 0;
        @first atom.relaxed.gpu.global.add.u32 got, [$1], 1;
        shfl.sync.idx.b32 $0, got, 0, 31, 0xffffffff;
        }""",
        "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def make_queue(CONSUMERS: gl.constexpr):
    """The tiles that the producer has claimed, and per place: there is one; all consumers have read it."""
    tiles = gl.allocate_shared_memory(gl.int32, [TILE_SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [TILE_SLOTS, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILE_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(TILE_SLOTS):
        mbarrier.init(tile_full.index(slot), count=1)
        mbarrier.init(tile_empty.index(slot), count=CONSUMERS)
    return tiles, tile_full, tile_empty


@gluon.jit
def say_tile(tiles, tile_full, tile_empty, count, tile):
    """Tell the consumers the count-th tile. By one warp."""
    slot = count % TILE_SLOTS
    mbarrier.wait(tile_empty.index(slot), (count // TILE_SLOTS + 1) & 1)
    tiles.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(tile_full.index(slot))


@gluon.jit
def read_tile(tiles, tile_full, tile_empty, count):
    """The count-th tile that the producer claimed."""
    slot = count % TILE_SLOTS
    mbarrier.wait(tile_full.index(slot), (count // TILE_SLOTS) & 1)
    tile = gl.max(tiles.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(tile_empty.index(slot))
    return tile


@gluon.jit
def make_row_rings(
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr
):
    """Shared memory of the head and of the rest of the rows.

    Where there is no rest its place is taken by the head, which nothing reads there.
    """
    REST: gl.constexpr = BLOCK_M - HEAD
    layout: gl.constexpr = gl.NVMMASharedLayout(128, DTYPE.primitive_bitwidth, 2)
    heads = gl.allocate_shared_memory(DTYPE, [STAGES, HEAD, BLOCK_K], layout)
    rests = heads
    if REST > 0:
        rests = gl.allocate_shared_memory(DTYPE, [STAGES, REST, BLOCK_K], layout)
    return heads, rests


@gluon.jit
def make_barriers(CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Per stage: weights and rows have arrived; all consumers are through with it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def rest_of(block_routes, R, BLOCK_M: gl.constexpr, HEAD: gl.constexpr):
    """How much of a block's rest has rows: 0 nothing, 1 no more than FEW, 2 more. Padding comes last in a block."""
    rest = 0
    if HEAD < BLOCK_M:
        rest += (gl.load(block_routes + HEAD) < R).to(gl.int32)
    if HEAD + FEW < BLOCK_M:
        rest += (gl.load(block_routes + HEAD + FEW) < R).to(gl.int32)
    return rest


@gluon.jit
def fetch_rows(
    x_head, x_few, x_rest, heads, rests, full, stage, row, rest, step,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Start the copies of one stage of rows; of the rest as much as has rows."""
    ROW: gl.constexpr = BLOCK_K * heads.dtype.primitive_bitwidth // 8
    REST: gl.constexpr = BLOCK_M - HEAD
    k = step * BLOCK_K
    if rest == 0:
        mbarrier.expect(full.index(stage), HEAD * ROW)
    elif REST > FEW and rest == 1:
        mbarrier.expect(full.index(stage), (HEAD + FEW) * ROW)
        few = rests.index(stage).slice(0, FEW, dim=0)
        tma.async_copy_global_to_shared(x_few, [row + HEAD, k], full.index(stage), few)
    elif REST > 0:
        mbarrier.expect(full.index(stage), BLOCK_M * ROW)
        tma.async_copy_global_to_shared(x_rest, [row + HEAD, k], full.index(stage), rests.index(stage))
    tma.async_copy_global_to_shared(x_head, [row, k], full.index(stage), heads.index(stage))
