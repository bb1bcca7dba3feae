"""How the numbers of a tile lie on Hopper, in registers and in shared memory: what `sm90_gemm` and its users share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def powers(first, end):
    """[first, 2 * first, ..] below end."""
    out = []
    while first < end:
        out.append(first)
        first *= 2
    return out


@gluon.constexpr_function
def fragment_shared(block_n, block_k):
    """Shared memory offset -> (row, k) of a stage: panels of 64 rows, fragments of 32 k, 16 bytes a thread."""
    bases = [[0, 1], [8, 0], [0, 8], [0, 16]]  # the 16 bytes of a thread
    bases += [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]  # the 128 threads
    bases += [[0, k] for k in powers(32, block_k)]
    bases += [[n, 0] for n in powers(64, block_n)]
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def code_bits():
    """The 16 adjacent codes of a thread, and the 4 threads that share 64 k of a row, as bits of wgmma's k."""
    return [[0, 1], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4]]


@gluon.constexpr_function
def code_shared(block_n):
    """Shared memory offset -> (row, k) of 64 k of codes in their own order."""
    own, across = code_bits()
    return gl.SharedLinearLayout(own + across + [[n, 0] for n in powers(1, block_n)])


@gluon.constexpr_function
def code_layout(block_n, warps):
    """Register operand of wgmma, [BLOCK_N, 64], but for the order of a thread's registers: adjacent codes first."""
    own, across = code_bits()
    panels = powers(64, block_n)
    few = len(powers(4, warps))  # as in group_layout
    registers = own + [[8, 0]] + [[n, 0] for n in panels[few:]]
    warp = [[16, 0], [32, 0]] + [[n, 0] for n in panels[:few]]
    return gl.DistributedLinearLayout(registers, [*across, [1, 0], [2, 0], [4, 0]], warp, [], [block_n, 64])


@gluon.constexpr_function
def group_layout(block_n, columns, warps):
    """Register operand of wgmma, [BLOCK_N, columns], as [BLOCK_N, columns / 32, 32]: a scale for the last one."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16]] + [[0, g, 0] for g in powers(1, columns // 32)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    panels = powers(64, block_n)
    own = len(powers(4, warps))  # further warpgroups take further panels, the rest of the panels repeat
    warp = [[16, 0, 0], [32, 0, 0]] + [[n, 0, 0] for n in panels[:own]]
    registers += [[n, 0, 0] for n in panels[own:]]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [block_n, columns // 32, 32])


@gluon.constexpr_function
def row_copy_layout(block_k, warps, pairs=False):
    """Copies of [rows, BLOCK_K] BF16: 16 bytes a thread, a warp on as many whole rows as it spans; or in pairs."""
    if pairs:
        return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])
    return gl.BlockedLayout([1, 8], [256 // block_k, block_k // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def sum_layout(block_m, warps):
    """The sums of wgmma, [BLOCK_N, BLOCK_M]."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_m, 16])


@gluon.constexpr_function
def fragment_copy_layout(shape, warps, pairs):
    """Copies of [2, panels, bytes], 16 bytes a thread; if pairs, 8 threads a row of 128 bytes, half in each part."""
    if not pairs:
        return gl.BlockedLayout([1, 1, 16], [1, 1, 32], [1, 1, warps], [2, 1, 0])
    inside = [[0, 0, offset] for offset in powers(1, shape[2])]
    panels = [[0, panel, 0] for panel in powers(1, shape[1])]
    lanes = [*inside[4:6], [1, 0, 0], *inside[6:8]]
    warp = len(powers(1, warps))
    return gl.DistributedLinearLayout(inside[:4] + inside[8 + warp :] + panels, lanes, inside[8 : 8 + warp], [], shape)


@gluon.constexpr_function
def block_copy_layout(block_n, warps):
    """Copies of [2, BLOCK_N, 64] codes, 16 bytes a thread: 8 threads a row of 128 bytes, half in each part."""
    rows = [[0, row, 0] for row in powers(1, block_n)]
    inside = [[0, 0, offset] for offset in powers(1, 64)]
    warp = len(powers(1, warps))
    lanes = [*inside[4:], [1, 0, 0], *rows[:2]]
    return gl.DistributedLinearLayout(inside[:4] + rows[2 + warp :], lanes, rows[2 : 2 + warp], [], [2, block_n, 64])


@gluon.constexpr_function
def row_store_layout(block_n, warps):
    """Stores of [BLOCK_N, BLOCK_M] results, transposed: 16 bytes of a row of the output a thread."""
    across = min(32, block_n // 8)
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])
