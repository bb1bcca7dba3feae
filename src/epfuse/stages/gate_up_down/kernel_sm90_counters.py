"""Counters in memory by which the programs of one launch share out tiles, and wait for one another's results."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def say_done(counter):
    """Add 1 for each warp, once what it has stored is visible to the copy engines of all multiprocessors."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_until(counter, target):
    """Until the counter has reached ``target``; then what was stored before is there for this program's copies."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred less;
        .reg .b32 now;
        AGAIN:
        ld.acquire.gpu.global.u32 now, [$1];
        setp.lt.s32 less, now, $2;
        @less bra AGAIN;
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [counter, target], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
