"""Where each instruction's meaning is from, and what is known to differ on hardware."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from epfuse.aot.isa.mfma import SHAPES
from epfuse.aot.isa.program import Program
from epfuse.aot.isa.valu import VECTORS
from epfuse.aot.isa.vector_forms import bare

ISA = 'AMD, "AMD Instinct MI300 Instruction Set Architecture"'
PSEUDOCODE = "AMD's pseudocode in tinygrad 0.14.0, runtime/autogen/amd/cdna/str_pcode.py"
LLVM = "LLVM, AMDGPUUsage and lib/Target/AMDGPU"
WAITCNT = "LLVM, SIInsertWaitcnts.cpp"
HAZARDS = "LLVM, GCNHazardRecognizer.cpp"
CALCULATOR = "AMD, amd_matrix_instruction_calculator"
TRITON = "Triton, lib/Dialect/TritonGPU/IR/Dialect.cpp and LinearLayoutConversions.cpp"


@dataclass(frozen=True)
class Meaning:
    """What is known of a mnemonic.

    Attributes:
        mnemonic: the opcode without the encoding's suffix.
        kind: of instruction.
        source, second_source: where its meaning is from; the second one is what it was held against.
        differs: what is known, or not known, to differ on hardware; empty where nothing is.
    """

    mnemonic: str
    kind: str
    source: str
    second_source: str
    differs: str = ""


_NUMPY = "values by hand and NumPy (tests/aot/isa)"
_TORCH = "torch (tests/aot/isa/test_torch.py)"
_HAND = "values by hand (tests/aot/isa)"

_APPROXIMATE = (
    "The last bit: here it is the nearest float, the hardware promises one unit. Results and operands below 2**-126 "
    "are zeros here."
)
DIFFERS = {
    "v_exp_f32": _APPROXIMATE,
    "v_rcp_f32": _APPROXIMATE,
    "v_rcp_iflag_f32": _APPROXIMATE,
    "v_div_scale_f32": "For denominators beyond 2**126 the pseudocode scales up, which would overflow; here it scales "
    "down, as a correct division needs.",
    "v_div_fmas_f32": "The pseudocode scales by 2**32; here by 2**64 or 2**-64, which undoes v_div_scale_f32.",
    "v_min_f32": "A signalling NaN is not made quiet.",
    "v_max_f32": "A signalling NaN is not made quiet.",
    "v_cvt_f16_f32": "Subnormals are kept, as the kernels' mode says.",
    "v_cvt_f32_f16": "Subnormals are kept, as the kernels' mode says.",
    "v_fma_mixlo_f16": "Rounded to FP32, then to FP16, as the compiler's rule says; the hardware may round once.",
    "v_fma_mixhi_f16": "As v_fma_mixlo_f16.",
    "buffer_atomic_add_f32": "The order of additions: lane after lane here. Subnormals are kept here.",
    "global_atomic_add_f32": "As buffer_atomic_add_f32.",
    "s_setprio": "Has no effect here: waves run in a seeded order.",
    "s_barrier": "Waves run to a barrier in turn here, never at once; races are found by who touched what.",
}
_MATRIX = (
    "The order of additions and what is rounded in between: here products and C are summed in double precision and "
    "rounded once. Subnormals are kept here; the MI200 takes those of FP16 and BF16 for zeros (MIOpen's notes), and "
    "what this GPU does has not been seen."
)

_SCALAR = """
    abs_i32 add_i32 add_u32 addc_u32 addk_i32 and_b32 and_b64 and_saveexec_b64 andn2_b32 andn2_b64 ashr_i32 bfe_i32
    bfe_u32 bitcmp0_b32 bitcmp1_b32 brev_b32 cselect_b32 cselect_b64 lshl1_add_u32 lshl2_add_u32 lshl3_add_u32
    lshl4_add_u32 lshl_b32 lshl_b64 lshr_b32 lshr_b64 max_i32 max_u32 min_i32 min_u32 mov_b32 mov_b64 movk_i32
    mul_hi_i32 mul_hi_u32 mul_i32 mulk_i32 not_b32 not_b64 or_b32 or_b64 or_saveexec_b64 sub_i32 sub_u32 subb_u32
    xor_b32 xor_b64
"""
_FLOW = """
    barrier branch cbranch_execnz cbranch_execz cbranch_scc0 cbranch_scc1 cbranch_vccnz cbranch_vccz endpgm nop setprio
"""
_MASKS = """
    add_co_u32 addc_co_u32 cndmask_b32 sub_co_u32 subb_co_u32 subbrev_co_u32 subrev_co_u32 div_scale_f32 div_fmas_f32
"""
_PAIRS = "ashrrev_i64 lshl_add_u64 lshlrev_b64 lshrrev_b64 mad_u64_u32 mov_b64 pk_add_f32 pk_fma_f32 pk_mul_f32"
_LDS = """
    read_b32 read_b64 read_b96 read_b128 read_u8 read_i8 read_u16 read_i16 write_b8 write_b16 write_b32 write_b64
    write_b96 write_b128 read2_b32 read2_b64 read2st64_b32 read2st64_b64 write2_b32 write2_b64 write2st64_b32
    write2st64_b64 add_u32 bpermute_b32 swizzle_b32
"""
_MEMORY = """
    load_ubyte load_sbyte load_ushort load_sshort load_dword load_dwordx2 load_dwordx3 load_dwordx4 store_byte
    store_short store_dword store_dwordx2 store_dwordx3 store_dwordx4 atomic_add_f32
"""
_INTEGER_ORDERS, _INTEGERS = "eq ge gt le lt ne", "i16 i32 i64 u16 u32 u64"
_FLOAT_ORDERS = "eq ge gt le lg lt neq nge ngt nle nlg nlt o u"


def _named(prefix: str, names: str) -> list[str]:
    return [prefix + name for name in names.split()]


def _ordered(prefix: str, orders: str, kinds: str) -> list[str]:
    return [f"{prefix}{order}_{kind}" for order in orders.split() for kind in kinds.split()]


_OTHERS: list[tuple[str, list[str], str, str]] = [
    ("salu", _named("s_", _SCALAR), PSEUDOCODE, _HAND),
    ("salu", _ordered("s_cmp_", "eq ge gt le lg lt", "i32 u32"), PSEUDOCODE, _HAND),
    ("salu", _ordered("s_cmpk_", "eq ge gt le lg lt", "i32 u32"), PSEUDOCODE, _HAND),
    ("flow", _named("s_", _FLOW), ISA, _HAND),
    ("flow", ["s_waitcnt"], ISA, WAITCNT),
    ("valu", _ordered("v_cmp_", _INTEGER_ORDERS, _INTEGERS), PSEUDOCODE, _NUMPY),
    ("valu", _ordered("v_cmp_", _FLOAT_ORDERS, "f32"), PSEUDOCODE, _NUMPY),
    ("valu", _named("v_", _MASKS), PSEUDOCODE, _NUMPY),
    ("valu", _named("v_", _PAIRS), PSEUDOCODE, _HAND),
    ("valu", ["v_cvt_pk_f32_fp8"], PSEUDOCODE, _HAND),
    ("valu", ["v_readfirstlane_b32", "v_readlane_b32"], PSEUDOCODE, _HAND),
    ("smem", _named("s_load_", "dword dwordx2 dwordx4 dwordx8 dwordx16"), PSEUDOCODE, WAITCNT),
    ("lds", _named("ds_", _LDS), PSEUDOCODE, _HAND),
    ("vmem", _named("buffer_", _MEMORY), PSEUDOCODE, f"{LLVM} (descriptors and their range)"),
    ("vmem", _named("global_", _MEMORY), PSEUDOCODE, f"{LLVM} (addresses)"),
]


_WITH_TORCH = """
    v_mov_b32 v_not_b32 v_and_b32 v_or_b32 v_xor_b32 v_and_or_b32 v_or3_b32 v_bfi_b32 v_lshlrev_b32 v_lshrrev_b32
    v_ashrrev_i32 v_lshlrev_b16 v_lshrrev_b16 v_lshl_or_b32 v_lshl_add_u32 v_add_lshl_u32 v_xad_u32 v_bfe_u32 v_bfe_i32
    v_alignbit_b32 v_pack_b32_f16 v_add_u32 v_sub_u32 v_subrev_u32 v_add_u16 v_add3_u32 v_mul_lo_u32 v_mul_hi_u32
    v_mul_hi_i32 v_mul_u32_u24 v_mad_u32_u24 v_mul_i32_i24 v_mad_i32_i24 v_min_u32 v_max_u32 v_min_i32 v_max_i32
    v_max3_u32 v_cvt_f32_u32 v_cvt_u32_f32 v_add_f32 v_sub_f32 v_mul_f32 v_min_f32 v_max_f32 v_fma_f32 v_fmac_f32
    v_cvt_f32_f16 v_cvt_f16_f32 v_rcp_f32 v_rcp_iflag_f32 v_exp_f32 v_ldexp_f32 v_pk_add_f32 v_pk_mul_f32 v_pk_fma_f32
    v_cvt_pk_f32_fp8 v_cndmask_b32 v_perm_b32 v_div_scale_f32 v_div_fmas_f32 v_div_fixup_f32
    v_lshlrev_b64 v_lshrrev_b64 v_ashrrev_i64 v_lshl_add_u64 v_mov_b64 v_mad_u64_u32
    v_add_co_u32 v_addc_co_u32 v_sub_co_u32 v_subb_co_u32 v_subrev_co_u32 v_subbrev_co_u32
    ds_bpermute_b32 ds_swizzle_b32 ds_read_b32 ds_write_b32 ds_add_u32
    s_add_i32 s_add_u32 s_sub_i32 s_sub_u32 s_mul_i32 s_mul_hi_u32 s_mul_hi_i32 s_min_i32 s_max_i32 s_min_u32 s_max_u32
    s_and_b32 s_or_b32 s_xor_b32 s_andn2_b32 s_lshl_b32 s_lshr_b32 s_ashr_i32 s_lshl1_add_u32 s_lshl2_add_u32
    s_lshl3_add_u32 s_lshl4_add_u32 s_abs_i32 s_not_b32 s_mov_b32
"""
HELD_AGAINST_TORCH: frozenset[str] = frozenset(
    _named("", _WITH_TORCH)
    + _ordered("v_cmp_", _INTEGER_ORDERS, "i16 i32 i64 u16 u32")
    + _ordered("v_cmp_", _FLOAT_ORDERS, "f32")
    + _ordered("s_cmp_", "eq ge gt le lg lt", "i32 u32")
)
"""Mnemonics that a test runs beside the same operation of torch."""


def rows() -> list[Meaning]:
    """Every mnemonic that the interpreter knows, sorted."""
    found = [
        Meaning(
            name,
            "valu",
            ISA if name.startswith(("v_accvgpr", "v_fma_mix")) else PSEUDOCODE,
            _NUMPY,
            DIFFERS.get(name, ""),
        )
        for name in VECTORS
    ]
    found += [
        Meaning(name, "mfma", CALCULATOR, f"{TRITON}; wait states: {ISA}, table 37, and {HAZARDS}", _MATRIX)
        for name in SHAPES
    ]
    for kind, names, source, second in _OTHERS:
        found += [Meaning(name, kind, source, second, DIFFERS.get(name, "")) for name in names]
    found = [replace(each, second_source=_TORCH) if each.mnemonic in HELD_AGAINST_TORCH else each for each in found]
    return sorted(found, key=lambda each: each.mnemonic)


def mnemonics(programs: Iterable[Program]) -> set[str]:
    """What programs hold, without the encodings' suffixes."""
    return {bare(each.opcode)[0] for program in programs for each in program.instructions}
