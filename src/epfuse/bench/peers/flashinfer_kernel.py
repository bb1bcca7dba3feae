"""What FlashInfer's grouped products ask about rows beyond our route table."""

import triton
import triton.language as tl


@triton.jit
def limits_kernel(sorted_routes, num_padded, limits, blocks, R, BLOCK_M: tl.constexpr):
    """limits[b] is the slot past block b's last route; blocks[0] is how many blocks have routes."""
    block = tl.program_id(0)
    slots = tl.load(num_padded)
    tl.store(blocks, slots // BLOCK_M)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    routes = tl.load(sorted_routes + places, mask=places < slots, other=R)
    tl.store(limits + block, block * BLOCK_M + tl.sum((routes < R).to(tl.int32), 0))
