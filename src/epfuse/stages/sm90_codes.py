"""FP8 codes -> BF16 in registers, by bit operations, for Hopper's BF16 products of FP8 weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def dequantize(codes, scales):
    """E4M3 codes times scales -> BF16, four at a time.

    A word holds two woven pairs of codes (weights/fragment.py). A code's exponent and mantissa go into a BF16's low
    exponent bits, which is 2^-120 of the value, subnormals included; the scale makes up for it.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, upper;
        and.b32 a, $2, 0x87f087f0;
        shr.b32 upper, $2, 4;
        and.b32 upper, upper, 0x07000700;
        shl.b32 b, $2, 4;
        lop3.b32 b, b, 0x80f080f0, upper, 0xEA;
        mul.rn.bf16x2 $0, a, $3;
        mul.rn.bf16x2 $1, b, $4;
        }""",
        "=&r,=&r,r,r,r",
        [codes, scales],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def codes_to_bf16(codes):
    """E4M3 codes, none of them NaN, -> BF16 of their values times 2^-8, four adjacent ones at a time.

    2^-8, so that no sum of their products overflows that those of the weights would not. As in `dequantize` a code is
    put into a BF16's low exponent bits, subnormals included: its sign comes to fill the upper byte, a shift brings the
    rest to its place, and a mask clears what is between them.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, scale;
        prmt.b32 a, $2, 0, 0x9180;
        prmt.b32 b, $2, 0, 0xb3a2;
        shl.b32 a, a, 4;
        shl.b32 b, b, 4;
        and.b32 a, a, 0x87f087f0;
        and.b32 b, b, 0x87f087f0;
        mov.b32 scale, 0x77807780;
        mul.rn.bf16x2 $0, a, scale;
        mul.rn.bf16x2 $1, b, scale;
        }""",
        "=&r,=&r,r",
        [codes],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def codes_or_nan_to_bf16(codes):
    """As `codes_to_bf16`, but where one of four adjacent codes is NaN, NaN for two of them: their row's sum is NaN."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, scale, nans;
        .reg .pred found;
        prmt.b32 a, $2, 0, 0x9180;
        prmt.b32 b, $2, 0, 0xb3a2;
        shl.b32 a, a, 4;
        shl.b32 b, b, 4;
        and.b32 a, a, 0x87f087f0;
        and.b32 b, b, 0x87f087f0;
        mov.b32 scale, 0x77807780;
        mul.rn.bf16x2 $0, a, scale;
        mul.rn.bf16x2 $1, b, scale;
        and.b32 nans, $2, 0x7f7f7f7f;
        add.u32 nans, nans, 0x01010101;
        and.b32 nans, nans, 0x80808080;
        setp.ne.u32 found, nans, 0;
        @found mov.b32 $0, 0x7fff7fff;
        }""",
        "=&r,=&r,r",
        [codes],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def register_operand(codes, words, PART: gl.constexpr, a_layout: gl.constexpr, groups_layout: gl.constexpr):
    """BF16 register operand [rows, PART_K] of one part of a stage, from its codes and the rows' scale words."""
    BLOCK_N: gl.constexpr = codes.shape[0]
    COLUMNS: gl.constexpr = codes.shape[1]
    group = gl.arange(0, COLUMNS // 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, groups_layout)))
    bytes_ = (words[:, None] >> (group * 8 + PART * (COLUMNS // 4))[None, :]) & 0xFF
    scales = gl.expand_dims((bytes_ << 7).to(gl.uint16).to(gl.bfloat16, bitcast=True), 2)
    scales = gl.broadcast(scales, gl.full([BLOCK_N, COLUMNS // 32, 32], 0, gl.bfloat16, layout=groups_layout))[0]
    scales = gl.convert_layout(scales.reshape([BLOCK_N, COLUMNS]), a_layout, assert_trivial=True)
    return dequantize(codes, scales)
