"""Rules files: the shipped ones, and those of users that are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import epfuse
from epfuse.errors import ConfigError
from epfuse.profiling.classify import Classifier
from epfuse.profiling.events import TracedKernel
from epfuse.profiling.layers import Layers
from epfuse.profiling.phases import Phase
from epfuse.profiling.rules import LARGEST_FILE, RuleSet
from tests.profiling.traces import ACT, ATTENTION_HALF, GEMM, MOE_LAYER, NORM, TOPK

ALIGN = "void vllm::moe::moe_align_block_size_kernel<int>"
SUM = "void vllm::moe::moe_sum_kernel<c10::BFloat16, 4>"
MARLIN = "void marlin_moe_wna16::Marlin<1125899906909960l, 128, 4, 8, 4, false, 4, 2, false>(int4 const*)"
MATMUL = "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1"
CK = "void ck::kernel_moe_gemm<ck::GridwiseMoeGemmBlockScale<float>, true>(Argument)"

BACKENDS = {
    "vllm triton": ([ALIGN, "fused_moe_kernel", ACT, "fused_moe_kernel", SUM], "pgadc"),
    "vllm triton, fp8 activations": (
        [ALIGN, "per_token_group_quant", "fused_moe_kernel", ACT, "per_token_group_quant", "fused_moe_kernel", SUM],
        "p?ga?dc",
    ),
    "InferenceX 1782": ([ALIGN, "fused_moe_gated_kernel", "fused_moe_kernel", SUM], "pgdc"),
    "marlin": ([ALIGN, MARLIN, ACT, MARLIN, SUM], "pgadc"),
    "matmul_ogs fused": (["_sum_bitmatrix_rows", f"{MATMUL}_swiglu", MATMUL, "_finalize_matmul_scatter_bf16"], "pgdc"),
    "matmul_ogs": (["_combined_routing_compute", MATMUL, "_swiglu", MATMUL, "_reduce_grouped"], "pgadc"),
    "aiter two stages": (
        [
            "void ck_tile::kentry<1, ck_tile::MoeSortingKernel<...>>",
            "aiter::fmoe_stage1_bf16_pertokenFp8_g1u1_32x128",
            "moe_ck2stages_gemm2_64x32x32x128_1x1_MulABScaleExpertWeightShuffled_v3",
        ],
        "pgd",
    ),
    "composable kernel": (["ck_tile::MoeSortingMultiPhaseKernel_P0_v2", CK, CK], "pgd"),
    "aiter one stage": (["MoeSortingMultiPhaseKernel_P23", "aiter::fmoe_bf16_blockscaleFp8_g1u1_vs_silu"], "pg"),
    "trtllm-gen": (
        [
            "void moe::dev::routing::routingRenormalize::routingIndicesClusterKernel<KernelParams<float>>",
            "bmm_MxE4m3_MxE2m1MxE4m3_Fp32_t128x16x256_s5_et128x16_m128x16x32_cga1x1x1_16dp256b_TN_swiGlu_dynBatch_sm100f",
            "bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256_s5_et128x16_m128x16x32_cga1x1x1_16dp256b_TN_dynBatch_sm100f",
            "void moe::dev::finalize::finalizeKernelVecLoad<moe::dev::finalize::KernelParams<__nv_bfloat16>>",
        ],
        "pgdc",
    ),
    "trtllm-gen, DeepSeek FP8": (
        [
            "void moe::dev::routing::routingDeepSeek::routingIndicesClusterKernel<KernelParams<float>>",
            "bmm_Bfloat16_E4m3E4m3_Fp32_t128x8x128u2_s6_et64x8_m64x8x32_cga1x1x1_16dp256b_TN_dsFp8_dynBatch_sm100f",
            "void moe::dev::activation::activationDeepSeekKernel<KernelParams<cutlass::float_e4m3_t>>",
            "bmm_Bfloat16_E4m3E4m3_Fp32_t128x8x128u2_s6_et64x8_m64x8x32_cga1x1x1_16dp256b_TN_dsFp8_dynBatch_sm100f",
            "void moe::dev::finalize::finalizeDeepSeekKernel<KernelParams<__nv_bfloat16>>",
        ],
        "pgadc",
    ),
    "TensorRT-LLM, CUTLASS": (
        [
            "void tensorrt_llm::kernels::cutlass_kernels::fusedBuildExpertMapsSortFirstTokenKernel<128>",
            "void tensorrt_llm::kernels::cutlass_kernels::expandInputRowsKernel<__nv_bfloat16>",
            "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>>>",
            "void tensorrt_llm::kernels::cutlass_kernels::doActivationKernel<__nv_bfloat16>",
            "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>>>",
            "void tensorrt_llm::kernels::cutlass_kernels::finalizeMoeRoutingKernel<__nv_bfloat16>",
        ],
        "ppgadc",
    ),
    "epfuse": (["route_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"], "pgdc"),
    "epfuse, Hopper": (["count_kernel", "place_kernel", "gate_up_sm90_kernel", "down_sm90_kernel"], "ppgd"),
    "epfuse, Hopper with packed rows": (
        [
            "count_kernel",
            "place_kernel",
            "gather_kernel",
            "gate_up_down_sm90_kernel",
            "combine_kernel",
        ],
        "pppgc",
    ),
    "epfuse, Hopper with packed rows and dense weights": (
        ["gather_kernel", "gate_up_down_sm90_dense_kernel", "combine_kernel"],
        "pgc",
    ),
    "epfuse, FP8": (["quantize_kernel", "gate_up_fp8_kernel", "activate_kernel", "down_fp8_kernel"], "pgad"),
}
LETTERS = {"p": Phase.PREPARE, "g": Phase.GEMM1, "a": Phase.ACTIVATION, "d": Phase.GEMM2, "c": Phase.COMBINE}


def classify(classifier: Classifier, names: list[str], ranges: list[str] | None = None) -> list[Phase | None]:
    """Phases of one layer's kernels in one stream."""
    kernels = [TracedKernel(name, 0, 7, 10 * i, 5, None) for i, name in enumerate(names)]
    around = ranges or [""] * len(names)
    verdicts = classifier.by_name(kernels, around)
    classifier.by_context(kernels, around, Layers([range(len(names))], "repetition"), verdicts)
    return verdicts.phases


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_kernels_of(classifier: Classifier, backend: str) -> None:
    names, letters = BACKENDS[backend]
    got = classify(classifier, [*ATTENTION_HALF, GEMM, TOPK, *names])
    expected = [LETTERS.get(letter) for letter in letters]
    assert [g for g, e in zip(got[9:], expected, strict=True) if e] == [e for e in expected if e]
    assert got[:9] == [
        Phase.NORM,
        Phase.PROJECTION,
        Phase.NORM,
        Phase.NORM,
        Phase.ATTENTION,
        Phase.PROJECTION,
        Phase.NORM,
        Phase.ROUTER,
        Phase.ROUTER,
    ]


STAGES = {
    "route": Phase.PREPARE,
    "gather": Phase.PREPARE,
    "quantize": Phase.PREPARE,
    "gate_up": Phase.GEMM1,
    "gate_up_down": Phase.GEMM1,
    "activate": Phase.ACTIVATION,
    "down": Phase.GEMM2,
    "combine": Phase.COMBINE,
}
"""Folders of `epfuse.stages`, which are also what the families call their steps."""

PACKAGE = Path(epfuse.__path__[0])


def found_in(files: Iterable[Path], pattern: str) -> list[tuple[Path, str]]:
    """The pattern's group wherever it stands at a line's beginning, and in which file."""
    return [(file, text) for file in files for text in re.findall(pattern, file.read_text("utf-8"), flags=re.MULTILINE)]


def test_every_kernel_of_this_package_has_its_stages_phase(classifier: Classifier) -> None:
    folder = PACKAGE / "stages"
    kernels = found_in(folder.rglob("kernel*.py"), r"^def (\w+_kernel)\(")
    assert len(kernels) > 8
    names = [name for _, name in kernels]
    verdicts = classifier.by_name([TracedKernel(name, 0, 7, 0, 1, None) for name in names], [""] * len(names))
    expected = {name: STAGES[file.relative_to(folder).parts[0]] for file, name in kernels}
    assert dict(zip(names, verdicts.phases, strict=True)) == expected


def test_every_range_of_this_package_has_its_stages_phase(classifier: Classifier) -> None:
    ranges = {name for _, name in found_in((PACKAGE / "families").glob("*.py"), r'^ *\("(\w+)", ')}
    assert ranges == set(STAGES)
    for stage, phase in STAGES.items():
        assert classify(classifier, ["some_kernel"], [f"ProfilerStep#1 > epfuse::{stage}"]) == [phase]


def test_named_ranges_classify_plain_pytorch(classifier: Classifier) -> None:
    names = [
        "void at::native::index_elementwise_kernel<128, 4>",
        GEMM,
        "void at::native::vectorized_elementwise_kernel",
    ]
    for stage, phase in (("route", Phase.PREPARE), ("gate_up", Phase.GEMM1), ("down", Phase.GEMM2)):
        assert classify(classifier, names, [f"ProfilerStep#1 > epfuse::{stage}"] * 3) == [phase] * 3


def test_the_rows_and_the_weights_of_an_eager_expert(classifier: Classifier) -> None:
    gather, gemm = "void at::native::index_elementwise_kernel<128, 4>", "nvjet_sm90_tst_8x64_64x16_4x1_v_bz_TNN"
    elementwise = "void at::native::vectorized_elementwise_kernel<4>"
    expert = [
        "void at::native::write_indices",
        gather,
        gemm,
        elementwise,
        gemm,
        gather,
        elementwise,
        "indexFuncSmallIndex",
    ]
    prepare, combine = [Phase.PREPARE] * 2, [Phase.COMBINE] * 3
    expected = [*prepare, Phase.GEMM1, Phase.ACTIVATION, Phase.GEMM2, *combine]
    assert classify(classifier, expert * 3, ["nn.Module: Qwen3MoeExperts_7"] * 24) == expected * 3


def test_a_token_chosen_before_the_first_layer_is_output(classifier: Classifier) -> None:
    argmax = "void at::native::reduce_kernel<512, 1, at::native::ArgMaxOps<float>>"
    kernels = [
        TracedKernel(name, 0, 7, 10 * i, 5, None)
        for i, name in enumerate([argmax, "embedding", NORM, GEMM, NORM, GEMM])
    ]
    verdicts = classifier.by_name(kernels, [""] * 6)
    classifier.by_context(kernels, [""] * 6, Layers([range(2, 4), range(4, 6)], "repetition"), verdicts)
    assert verdicts.phases[:2] == [Phase.OUTPUT, Phase.INPUT]


def test_a_dense_layer_and_a_shared_expert(classifier: Classifier) -> None:
    assert classify(classifier, [*ATTENTION_HALF, GEMM, ACT, GEMM])[-3:] == [Phase.DENSE_FFN] * 3
    shared = [*ATTENTION_HALF, GEMM, ACT, GEMM, GEMM, TOPK, *MOE_LAYER[-5:]]
    assert classify(classifier, shared)[7:12] == [Phase.SHARED_EXPERT] * 3 + [Phase.ROUTER] * 2


@pytest.mark.parametrize(
    "name",
    [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*)",
        "void aiter::allreduce_fusion_kernel_1stage<__hip_bfloat16>",
        "void deep_ep::intranode::dispatch<8, 768, 8192>",
    ],
)
def test_collectives(classifier: Classifier, name: str) -> None:
    assert classify(classifier, [NORM, name, NORM])[1] is Phase.COLLECTIVES


@pytest.mark.parametrize("module", ["RowParallelLinear_3", "QKVAttention_1 > nn.Module: RowParallelLinear_1", "MLP_2"])
def test_a_kernels_own_name_is_believed_before_its_module(classifier: Classifier, module: str) -> None:
    reduce = "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<8>"
    names = [GEMM, reduce, "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", NORM]
    found = classify(classifier, names, [f"nn.Module: DecoderLayer_1 > nn.Module: {module}"] * 4)
    assert found[1:] == [Phase.COLLECTIVES, Phase.COLLECTIVES, Phase.NORM]


@pytest.mark.parametrize("stage", STAGES)
def test_a_collective_in_one_of_our_ranges_is_one(classifier: Classifier, stage: str) -> None:
    assert classify(classifier, ["ncclDevKernel_AllReduce_Sum"], [f"epfuse::{stage}"]) == [Phase.COLLECTIVES]


def test_the_weights_that_trtllm_gen_names(classifier: Classifier) -> None:
    names = [TOPK, *BACKENDS["trtllm-gen"][0]]
    verdicts = classifier.by_name(
        [TracedKernel(n, 0, 7, 10 * i, 5, None) for i, n in enumerate(names)], [""] * len(names)
    )
    assert {classifier.rules.rules[rule].weights for rule in verdicts.rules if rule is not None} == {None, "mxfp4"}


def test_an_unknown_kernel_stays_unclassified(classifier: Classifier) -> None:
    assert classify(classifier, [NORM, "my_strange_kernel", GEMM])[1] is None


def test_a_users_rules_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schema: 1\nname: mine\nrules:\n- {phase: dense FFN, kernel: fused_moe_kernel}\n")
    rules = RuleSet.load(path)
    assert rules.origins[0] == "mine"
    kernels = [TracedKernel("fused_moe_kernel", 0, 7, 0, 1, None)]
    assert Classifier(rules).by_name(kernels, [""]).phases == [Phase.DENSE_FFN]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file: Input should be a valid dictionary"),
        ("[1, 2", "is not YAML"),
        ("\x00", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("schema: 2\nname: x\nrules: []", "schema: Input should be 1"),
        ("schema: 1\nrules: []", "name: Field required"),
        ("schema: 1\nname: x\nrules: []\nextra: 1", "extra: Extra inputs are not permitted"),
        ("schema: 1\nname: x\nrules: [{phase: expert, kernel: x}]", "rules.0.phase: Input should be 'input'"),
        ("schema: 1\nname: x\nrules: [{phase: router}]", "a rule needs 'kernel' or 'range'"),
        ("schema: 1\nname: x\nrules: [{phase: router, kernel: '('}]", "is no regular expression"),
        ("schema: 1\nname: x\nrules: [{phase: router, kernel: 7}]", "must be a regular expression"),
        ("schema: 1\nname: x\nrules: [{phase: router, kernel: x, after: [lunch]}]", "rules.0.after"),
        ("schema: 1\nname: x\nrules: [{phase: router, kernel: x, position: middle}]", "rules.0.position"),
        ("a: " + "[" * 20_000, "is not YAML"),
        ("x: 1\n" * (LARGEST_FILE // 5 + 1), "has more than"),
    ],
)
def test_rules_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        RuleSet.load(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_rules_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        RuleSet.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        RuleSet.load(tmp_path / "binary.yaml")


def test_the_kernel_that_quantises_before_both_gemms(classifier: Classifier) -> None:
    names = [
        "route_kernel",
        "quantize_packed_kernel",
        "gate_up_sm90_fp8_kernel",
        "quantize_packed_kernel",
        "down_sm90_fp8_kernel",
    ]
    found = classify(classifier, names, [""] * len(names))
    assert found == [Phase.PREPARE, Phase.PREPARE, Phase.GEMM1, Phase.ACTIVATION, Phase.GEMM2]
