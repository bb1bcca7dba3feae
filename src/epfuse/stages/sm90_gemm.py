"""Device code of both GEMMs for Hopper, in Gluon: weights on the M side of wgmma, routed rows on the N side.

One program makes [BLOCK_N weight rows, BLOCK_M routed rows]; rows come in steps of 8 rather than 64. Both operands are
copied into a ring of shared memory, BLOCK_K of the reduction to a stage.

Dense weights are multiplied from there. MXFP8 weights lie in fragment order (weights/fragment.py): what a thread copies
16 bytes at a time is what it multiplies with, so they go shared memory -> registers in 16-byte loads, become BF16 by
bit operations and enter wgmma as its register operand, a part of a stage at a time: one part is made while the part
before is multiplied.

FP8 weights with one scale a row (weights/row_fp8.py) lie in their own order, which the FP8 tensor cores read. Here a
thread multiplies with 16 adjacent codes of a row all the same: what wgmma takes for the k of its fragments is another
order of the same 64 k (`k_of_pair`), and the rows of x are copied in that order, two numbers at a time. So it is with
block FP8 weights (weights/block_fp8.py), which lie as checkpoints have them; a stage is one block of k, whose sum is
multiplied by the block's scale and then added to that of the stages before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from epfuse.stages.sm90_codes import codes_or_nan_to_bf16, codes_to_bf16, register_operand
from epfuse.stages.sm90_layouts import (
    block_copy_layout,
    code_layout,
    code_shared,
    fragment_copy_layout,
    fragment_shared,
    group_layout,
    row_copy_layout,
    sum_layout,
)

BLOCK = gl.constexpr(128)  # rows and columns of block FP8 weights that share a scale
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name since Triton 3.7, and before


@gluon.jit
def k_of_pair(pair):
    """Which pair of a row's numbers wgmma takes for its ``pair`` of k, as `code_bits` has them."""
    return pair // 32 * 32 + pair % 4 * 8 + pair % 32 // 4


@gluon.constexpr_function
def in_pairs(scales):
    """Whether weights with such scales are multiplied in the order of `k_of_pair`: with one scale a row or a block."""
    return scales is not None and scales.dtype.element_ty == gl.float32


@gluon.constexpr_function
def in_blocks(weights):
    """Whether pointers are to block FP8 weights; of the other codes kernels take the bytes."""
    return weights.dtype.element_ty == gl.float8e4nv


@gluon.jit
def wait_for_previous_kernel():
    """Programmatic dependent launch: past this point the results of the kernels launched before are visible."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def let_next_kernel_start():
    """Programmatic dependent launch: once every program has said so, the next kernel's programs fill idle places."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def fetch_into_l2(ptrs, BYTES: gl.constexpr):
    """Ask for BYTES at each pointer to be brought into L2."""
    sizes = gl.full(ptrs.shape, BYTES, gl.int32, layout=ptrs.type.layout)
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r", [ptrs, sizes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def tile_of(pid, m_blocks, n_blocks, GROUP_M: gl.constexpr):
    """Program id -> (row block, column block); see grouped_gemm.tile_of."""
    rows = m_blocks
    if GROUP_M > 0:
        rows = gl.minimum(m_blocks, GROUP_M)
    group = pid // (rows * n_blocks)
    inside = pid % (rows * n_blocks)
    rows_here = gl.minimum(m_blocks - group * rows, rows)
    return group * rows + inside % rows_here, inside // rows_here


@gluon.jit
def fragment_pointers(
    w, panel, last_panel, K_PADDED, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, PARTS: gl.constexpr,
    PAIRS: gl.constexpr = False,
):  # fmt: skip
    """Pointers to this tile's codes at k = 0, ``[PARTS, panels, bytes of a part of a stage]``.

    Args:
        w: ``[panels, K_PADDED / 32, 2048]`` codes; ``[panels, K_PADDED / 128, 64, 128]`` if PAIRS, where a part is
            64 k of each row.
        panel: first panel of the tile; past last_panel that one is read again, for rows that are not stored.
    """
    BYTES: gl.constexpr = 64 * BLOCK_K // PARTS
    layout: gl.constexpr = fragment_copy_layout([PARTS, BLOCK_N // 64, BYTES], gl.num_warps(), PAIRS)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    panels = panel + gl.arange(0, BLOCK_N // 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    panels = gl.minimum(panels, last_panel).to(gl.int64)
    inside = gl.arange(0, BYTES, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    if PAIRS:
        part *= 64
        inside += inside // 64 * 64
    else:
        part *= BYTES
    offsets = (panels * K_PADDED * 64)[None, :] + part[:, None]
    return w + offsets[:, :, None] + inside[None, None, :]


@gluon.jit
def fragment_scale_pointers(w_scale, panel, last_panel, K_PADDED, ROWS: gl.constexpr, PART_K: gl.constexpr):
    """Pointers to the scale words of ROWS weight rows at k = 0.

    Args:
        w_scale: ``[panels, K_PADDED / 128, 64]`` int32, four scale bytes of a row in each.
        panel, last_panel: as for `fragment_pointers`.
        PART_K: k that is dequantised at a time.
    """
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, group_layout(ROWS, PART_K, gl.num_warps())))
    rows = gl.arange(0, ROWS, layout=layout)
    panels = gl.minimum(panel + rows // 64, last_panel).to(gl.int64)
    return w_scale + panels * (K_PADDED // 2) + rows % 64


@gluon.jit
def row_scale_pointers(w_scale, panel, last_panel, ROWS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Pointers to the scales of ROWS weight rows, as the sums' rows lie; panels as for `fragment_pointers`.

    Args:
        w_scale: ``[panels, 64]`` float32.
    """
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, sum_layout(BLOCK_M, gl.num_warps())))
    return w_scale + gl.minimum(panel + rows // 64, last_panel) * 64 + rows % 64


@gluon.jit
def block_pointers(w, offsets):
    """Pointers to block FP8 codes at k = 0, ``[2, rows, 64]``, from each row's offset as `rows_of_blocks` lie."""
    layout: gl.constexpr = block_copy_layout(offsets.shape[0], gl.num_warps())
    part = gl.arange(0, 2, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout))) * 64
    inside = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return w + (offsets[None, :] + part[:, None])[:, :, None] + inside[None, None, :]


@gluon.jit
def rows_of_blocks(BLOCK_N: gl.constexpr):
    """0, 1, .. below BLOCK_N, as `block_pointers` wants a tile's rows."""
    layout: gl.constexpr = block_copy_layout(BLOCK_N, gl.num_warps())
    return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))


@gluon.jit
def row_pointers(base, offsets, BLOCK_K: gl.constexpr, PAIRS: gl.constexpr = False):
    """Pointers ``[rows, BLOCK_K]`` at k = 0, from each row's element offset in ``SliceLayout(1, row_copy_layout)``.

    If PAIRS, to int32: ``[rows, BLOCK_K / 2]`` pairs of BF16 in the order of `k_of_pair`.
    """
    layout: gl.constexpr = row_copy_layout(BLOCK_K, gl.num_warps(), PAIRS)
    if PAIRS:
        pairs = k_of_pair(gl.arange(0, BLOCK_K // 2, layout=gl.SliceLayout(0, layout)))
        ptrs = base.to(gl.pointer_type(gl.int32), bitcast=True) + (offsets // 2)[:, None] + pairs[None, :]
    else:
        ptrs = base + offsets[:, None] + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))[None, :]
    return ptrs


@gluon.jit
def copy_rows(stage, ptrs, live, k, K, EVEN_K: gl.constexpr):
    """Start the copy of one stage of rows; zeros, and no traffic, for padding rows and past K."""
    PAIRS: gl.constexpr = ptrs.dtype.element_ty == gl.int32
    inside = live[:, None]
    if not EVEN_K:
        columns = gl.arange(0, ptrs.shape[1], layout=gl.SliceLayout(0, ptrs.type.layout))
        if PAIRS:
            columns = k_of_pair(columns) * 2
        inside = inside & (columns < K - k)[None, :]
    if PAIRS:
        pairs = stage._reinterpret(gl.int32, ptrs.shape, gl.NVMMASharedLayout(128, 32, 2))
        async_copy.async_copy_global_to_shared(pairs, ptrs + k // 2, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(stage, ptrs + k, mask=inside)


@gluon.jit
def copy_weights(stage, ptrs, k, K, MASKED: gl.constexpr):
    """Start the copy of one stage of weights; MASKED: unpacked ones, with zeros past K, where another row begins."""
    if MASKED and in_blocks(ptrs):
        layout: gl.constexpr = ptrs.type.layout
        part = gl.arange(0, ptrs.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        columns = gl.arange(0, ptrs.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
        inside = (part * ptrs.shape[2])[:, None, None] + columns[None, None, :] < K - k
        async_copy.async_copy_global_to_shared(stage, ptrs + k, mask=inside)
    elif MASKED:
        columns = gl.arange(0, ptrs.shape[1], layout=gl.SliceLayout(0, ptrs.type.layout))
        async_copy.async_copy_global_to_shared(stage, ptrs + k, mask=(columns < K - k)[None, :])
    else:
        async_copy.async_copy_global_to_shared(stage, ptrs + k)


@gluon.jit
def share_of(total, split, shares):
    """First step and number of steps of one of ``shares`` programs that share a tile's reduction.

    Where there are more programs than steps, those without one get the last step as their first: its scales are read
    ahead, whether it is multiplied or not.
    """
    each = (total + shares - 1) // shares
    first = split * each
    return gl.minimum(first, total - 1), gl.maximum(gl.minimum(each, total - first), 0)


@gluon.jit
def tail_tile_of(pid, tiles, PLACES, TAIL_SPLIT: gl.constexpr):
    """A program's tile, which share of it, of how many, and the tile's number among those that are shared.

    The tiles of full waves of PLACES programs have one program each, the others TAIL_SPLIT: few programs take as long
    as many to go through all steps of a tile, while memory is idle.
    """
    whole = tiles // PLACES * PLACES
    inside = pid - whole
    shared = gl.minimum(gl.maximum(inside + 1, 0), 1)
    tile = pid + shared * (inside // TAIL_SPLIT - inside)
    split = shared * (inside % TAIL_SPLIT)
    shares = 1 + shared * (TAIL_SPLIT - 1)
    return tile, split, shares, tile - whole


@gluon.jit
def sum_of_shares(acc, partials, arrivals, tile, split, SPLIT_K: gl.constexpr):
    """Leave this program's share in memory; the last of a tile's programs to do so gets the sum, in a fixed order.

    Args:
        partials: FP32 ``[tiles, SPLIT_K, BLOCK_N, BLOCK_M]``.
        arrivals: int32 ``[tiles]``, zero before the launch.

    Returns:
        The sum, and whether this program is the one that has it.
    """
    layout: gl.constexpr = acc.type.layout
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    inside = rows[:, None] * BLOCK_M + columns[None, :]
    shares = partials + tile.to(gl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M)
    gl.store(shares + split * (BLOCK_N * BLOCK_M) + inside, acc)
    thread_barrier()  # every thread's share is written before one thread says so
    last = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=layout)
        for share in gl.static_range(SPLIT_K):
            acc += gl.load(shares + share * (BLOCK_N * BLOCK_M) + inside, cache_modifier=".cg")
    return acc, last


@gluon.jit
def weights_times_rows(
    w_ptrs, s_ptrs, x_ptrs, live, K, steps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    EVEN_K: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """FP32 [BLOCK_N, BLOCK_M] = W . X^T over K.

    Args:
        w_ptrs: from `row_pointers` (dense), `fragment_pointers` or `block_pointers`.
        s_ptrs: from `fragment_scale_pointers` or `row_scale_pointers`; to the scales of each row's first block, as the
            sums' rows lie; None for dense weights.
        x_ptrs: from `row_pointers`.
        live: bool ``[BLOCK_M]`` in the rows' layout; the others are padding.
        K: columns of x, and of dense weights, that are left from the pointers on.
        steps: stages to go through.
        WAIT: whether x comes from the kernel before: weights are fetched first, then that kernel is waited for.
    """
    WARPS: gl.constexpr = gl.num_warps()
    DENSE: gl.constexpr = s_ptrs is None
    BLOCKS: gl.constexpr = in_blocks(w_ptrs)
    W_STEP: gl.constexpr = BLOCK_K if DENSE or BLOCKS else 64 * BLOCK_K
    MASKED: gl.constexpr = (DENSE or BLOCKS) and not EVEN_K
    PAIRS: gl.constexpr = in_pairs(s_ptrs)
    acc_layout: gl.constexpr = sum_layout(BLOCK_M, WARPS)
    row_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], row_shared)
    if DENSE:
        w_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], row_shared)
    else:
        in_order: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        if BLOCKS:
            w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 2, BLOCK_N, BLOCK_K // 2], in_order)
        else:
            w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, 2, BLOCK_N // 64, 32 * BLOCK_K], in_order)
        a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
        next_words = gl.load(s_ptrs)  # if PAIRS the scales themselves
        if PAIRS:
            gl.static_assert(BLOCK_K == 128)
            codes_layout: gl.constexpr = code_layout(BLOCK_N, WARPS)
            fragments = w_ring._reinterpret(gl.uint8, [STAGES * 2, BLOCK_N, 64], code_shared(BLOCK_N))
        else:
            fragments = w_ring._reinterpret(
                gl.uint8, [STAGES * 2, BLOCK_N, BLOCK_K // 2], fragment_shared(BLOCK_N, BLOCK_K // 2)
            )
            groups_layout: gl.constexpr = group_layout(BLOCK_N, BLOCK_K // 2, WARPS)

    if WAIT:
        for early in gl.static_range(STAGES - 1):
            if early < steps:
                copy_weights(w_ring.index(early), w_ptrs, early * W_STEP, K, MASKED)
        wait_for_previous_kernel()
    for early in gl.static_range(STAGES - 1):
        if early < steps:
            if not WAIT:
                copy_weights(w_ring.index(early), w_ptrs, early * W_STEP, K, MASKED)
            copy_rows(x_ring.index(early), x_ptrs, live, early * BLOCK_K, K, EVEN_K)
        async_copy.commit_group()
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=acc_layout)
    if BLOCKS:
        part = acc
    for step in range(0, steps):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        stage = step % STAGES
        if DENSE:
            acc = warpgroup_mma(w_ring.index(stage), x_ring.index(stage).permute((1, 0)), acc, is_async=True)
        else:
            # after the fence, which would wait for a load that is under way
            if BLOCKS:
                scale = next_words
                next_words = gl.load(s_ptrs + gl.minimum(step + 1, steps - 1))
            elif not PAIRS:
                words = next_words
                next_words = gl.load(s_ptrs + gl.minimum(step + 1, steps - 1) * 64)
            for half in gl.static_range(2):
                if BLOCKS:
                    codes = fragments.index(stage * 2 + half).load(codes_layout)
                    a = gl.convert_layout(codes_or_nan_to_bf16(codes), a_layout, assert_trivial=True)
                elif PAIRS:
                    codes = fragments.index(stage * 2 + half).load(codes_layout)
                    a = gl.convert_layout(codes_to_bf16(codes), a_layout, assert_trivial=True)
                else:
                    codes = fragments.index(stage * 2 + half).load(a_layout)
                    a = register_operand(codes, words, half, a_layout, groups_layout)
                rows = x_ring.index(stage).slice(half * (BLOCK_K // 2), BLOCK_K // 2, dim=1)
                if BLOCKS:
                    part = warpgroup_mma(a, rows.permute((1, 0)), part, use_acc=half == 1, is_async=True)
                else:
                    acc = warpgroup_mma(a, rows.permute((1, 0)), acc, is_async=True)
        # the stage to refill was multiplied in the step before, which every warp has left behind at the barrier above
        ahead = step + STAGES - 1
        if ahead < steps:
            copy_weights(w_ring.index(ahead % STAGES), w_ptrs, ahead * W_STEP, K, MASKED)
            copy_rows(x_ring.index(ahead % STAGES), x_ptrs, live, ahead * BLOCK_K, K, EVEN_K)
        async_copy.commit_group()
        if BLOCKS:
            part = warpgroup_mma_wait(0, deps=[part])
            acc += part * scale[:, None]
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
    if BLOCKS:
        acc *= 256  # codes_or_nan_to_bf16's 2^-8
    elif PAIRS:
        acc *= (next_words * 256)[:, None]  # codes_to_bf16's 2^-8
    return acc
