"""Both GEMMs in one launch for Hopper: a program goes on from gate_up's tiles to down's, without a gap between kernels.

Tiles are claimed from a counter, all of gate_up's before the first of down's, so a program that waits for rows waits
for programs that are running: none depends on how many of them the GPU holds at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from epfuse.kernel_cache import cached
from epfuse.stages.gate_up_down.kernel_sm90_counters import say_done, wait_until
from epfuse.stages.gate_up_down.kernel_sm90_multiply import consume_tile, fetch_weights, make_panels
from epfuse.stages.sm90_gemm import let_next_kernel_start, tile_of, wait_for_previous_kernel
from epfuse.stages.sm90_persistent import (
    claim,
    fetch_rows,
    make_barriers,
    make_queue,
    make_row_rings,
    read_tile,
    rest_of,
    say_tile,
)

WARPS = gl.constexpr(4)  # of a consumer


@gluon.jit
def copy_tile(
    w, x_head, x_few, x_rest, panel, row, rest, K_PADDED, ready, target,
    heads, rests, panels, full, empty, done, waited,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy every stage of one tile; of the first one the weights before the rows are there, which may take time.

    Rows are there when the kernel before has finished, and the counter at ready has reached target.
    """
    for step in range(0, K_PADDED // BLOCK_K):
        stage = done % STAGES
        mbarrier.wait(empty.index(stage), (done // STAGES + 1) & 1)
        fetch_weights(w, panels, full, stage, panel, step, K_PADDED, BLOCK_K, CONSUMERS)
        if step == 0:
            if waited == 0:
                wait_for_previous_kernel()
                waited = 1
            wait_until(ready, target)
        fetch_rows(x_head, x_few, x_rest, heads, rests, full, stage, row, rest, step, BLOCK_M, HEAD, BLOCK_K)
        done += 1
    return done, waited


@gluon.jit
def produce_both(
    args, up_args, down_args,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Claim tiles, say which, and copy every stage of them."""
    (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    ) = args  # fmt: skip
    x_head, x_few, x_rest, w13, H_PADDED, UP_PANELS = up_args
    y_head, y_few, y_rest, w2, I_PADDED, DOWN_PANELS = down_args
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    done = 0
    count = 0
    tile = claim(arrivals)
    waited = 0
    while count >= 0:
        say_tile(tiles, tile_full, tile_empty, count, tile)
        if tile >= total:
            count = -1
        else:
            count += 1
            down = tile >= ups
            m, n = tile_of(tile, m_blocks, n_up, GROUP_M)
            if down:
                m, n = tile_of(tile - ups, m_blocks, n_down, GROUP_M)
            expert = gl.load(block_expert + m)
            row = gl.load(block_row + m)
            rest = rest_of(sorted_routes + m * BLOCK_M, R, BLOCK_M, HEAD)
            if down:
                panel = expert * DOWN_PANELS + n * CONSUMERS
                done, waited = copy_tile(
                    w2, y_head, y_few, y_rest, panel, row, rest, I_PADDED, arrivals + 1 + m, n_up * CONSUMERS * WARPS,
                    heads, rests, panels, full, empty, done, waited, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES,
                )  # fmt: skip
            else:
                panel = expert * UP_PANELS + n * CONSUMERS
                done, waited = copy_tile(
                    w13, x_head, x_few, x_rest, panel, row, rest, H_PADDED, arrivals, 0,
                    heads, rests, panels, full, empty, done, waited, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES,
                )  # fmt: skip
            tile = claim(arrivals)
    if waited == 0:  # even without a tile of its own: don't finish before the kernel before
        wait_for_previous_kernel()


@gluon.jit
def consume_both(
    args, up_args, down_args, consumer: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Multiply and store this consumer's panel of every tile that the producer claims."""
    (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    ) = args  # fmt: skip
    w13_scale, H_PADDED, UP_PANELS, up_store = up_args
    w2_scale, I_PADDED, DOWN_PANELS, down_store = down_args
    ups = m_blocks * n_up
    total = ups + m_blocks * n_down
    which = gl.to_tensor(consumer)  # no constant: what it calls is traced once for all consumers
    done = 0
    count = 0
    tile = read_tile(tiles, tile_full, tile_empty, count)
    while tile < total:
        up = tile < ups
        m, n = tile_of(gl.where(up, tile, tile - ups), m_blocks, gl.where(up, n_up, n_down), GROUP_M)
        done = consume_tile(
            gl.where(up, w13_scale, w2_scale), gl.where(up, H_PADDED, I_PADDED), gl.where(up, UP_PANELS, DOWN_PANELS),
            m, n, sorted_routes, block_expert, block_row, heads, rests, panels, full, empty, done, R,
            (up, up_store, down_store), which, ACTIVATION, BLOCK_M, HEAD, BLOCK_K, CONSUMERS, STAGES, PARTS,
        )  # fmt: skip
        if up:
            say_done(arrivals + 1 + m)
        count += 1
        tile = read_tile(tiles, tile_full, tile_empty, count)


@cached
@gluon.jit(do_not_specialize=["R", "UP_PANELS", "DOWN_PANELS"])
def gate_up_down_sm90_kernel(
    x_head, x_few, x_rest, w13_lines, w13_scale, up_bias, y,
    y_head, y_few, y_rest, w2_lines, w2_scale, down_bias, topk_weights, out,
    lone_token, final, sorted_routes, block_expert, block_row, num_padded, arrivals,
    R, H, I, H_PADDED, I_PADDED, UP_PANELS, DOWN_PANELS, activation,
    BLOCK_M: gl.constexpr, HEAD: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """gate_up_sm90_kernel, then down_sm90_kernel, for rows that lie packed in the table's order; so do the results.

    The route table is read before the kernel before, which gathers the rows, has finished: it starts this one after it
    has waited for the table. Without panels of one GEMM only the other runs.

    out may be the memory of x: the rows of a block are read for the last time before they are written. What a copy
    finds past a tile's last row may be written meanwhile; it is multiplied for columns that are not stored.

    Args:
        x_head, x_few, x_rest: tensor descriptors of BF16 x [R, H], packed: a block's head, a few rows of its rest and
            all of its rest, BLOCK_K columns at a time; None for what no block needs.
        w13_lines: tensor descriptor of the codes in fragment order, lines of 128 bytes, a panel and BLOCK_K at a time.
        w13_scale: int32 [L, UP_PANELS, H_PADDED / 128, 64].
        up_bias: FP32 [L, 2I], gate before up; None for none.
        y: BF16 [R, I], packed; written, then read through y_head, y_few and y_rest, descriptors like x's.
        w2_lines: as w13_lines.
        w2_scale: int32 [L, DOWN_PANELS, I_PADDED / 128, 64].
        down_bias: FP32 [L, H]; None for none.
        topk_weights: FP32 [T, K], by route.
        out: BF16 [R, H], packed.
        lone_token, final: as store_weighted takes them.
        sorted_routes, block_expert, block_row, num_padded: int32, see RouteTable.
        arrivals: int32 zeros: tiles claimed, then for each row block the warps that are through with gate_up's panels.
        R: routes, T * K.
        H: columns of out.
        I: columns of y.
        H_PADDED: columns of w13, whole steps of 128.
        I_PADDED: columns of w2, whole steps of 128.
        UP_PANELS: panels of 64 rows of one expert's w13; 0 to leave gate_up out.
        DOWN_PANELS: the same of w2; 0 to leave down out.
        activation: FP32 parameters of ACTIVATION, a tuple.
    """
    let_next_kernel_start()
    m_blocks = gl.load(num_padded) // BLOCK_M
    n_up = (UP_PANELS + CONSUMERS - 1) // CONSUMERS
    n_down = (DOWN_PANELS + CONSUMERS - 1) // CONSUMERS
    heads, rests = make_row_rings(BLOCK_M, HEAD, BLOCK_K, STAGES, gl.bfloat16)
    panels = make_panels(BLOCK_K, CONSUMERS, STAGES)
    full, empty = make_barriers(CONSUMERS, STAGES)
    tiles, tile_full, tile_empty = make_queue(CONSUMERS)
    args = (
        sorted_routes, block_expert, block_row, arrivals, m_blocks, n_up, n_down,
        tiles, tile_full, tile_empty, heads, rests, panels, full, empty, R,
    )  # fmt: skip
    up_args = (w13_scale, H_PADDED, UP_PANELS, (up_bias, y, I, activation))
    down_args = (w2_scale, I_PADDED, DOWN_PANELS, (down_bias, topk_weights, out, H, lone_token, final))
    up_copies = (x_head, x_few, x_rest, w13_lines, H_PADDED, UP_PANELS)
    down_copies = (y_head, y_few, y_rest, w2_lines, I_PADDED, DOWN_PANELS)
    # the numbers of registers are those of the partitions but the first, which gets the rest
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume_both, (
                    args, up_args, down_args, 0, ACTIVATION,
                    BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES, PARTS,
                )),
                (consume_both, (
                    args, up_args, down_args, 1, ACTIVATION,
                    BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES, PARTS,
                )),
                (produce_both, (args, up_copies, down_copies, BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume_both, (
                    args, up_args, down_args, 0, ACTIVATION,
                    BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES, PARTS,
                )),
                (consume_both, (
                    args, up_args, down_args, 1, ACTIVATION,
                    BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES, PARTS,
                )),
                (consume_both, (
                    args, up_args, down_args, 2, ACTIVATION,
                    BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES, PARTS,
                )),
                (produce_both, (args, up_copies, down_copies, BLOCK_M, HEAD, BLOCK_K, GROUP_M, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
