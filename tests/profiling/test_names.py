from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epfuse.profiling.names import short_name


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("gate_up_kernel", "gate_up_kernel"),
        ("void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*)", "vllm::rotary_embedding_kernel"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<int>", "at::native::CatArrayBatchedCopy"),
        ("_ZN7ck_tile6kentryILi1ENS_12Rmsnorm2dFwdINS_27Rmsnorm2dFwd", "ck_tile::kentry::Rmsnorm2dFwd"),
        (
            "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT16x16x256_MI16x16x1_SN",
            "Cijk_Alik_Bljk_MT16x16x256_MI16x16x1_SN",
        ),
        ("_ZNnonsense", "_ZNnonsense"),
        ("<lambda>", "<lambda>"),
        ("x" * 60, "x" * 55 + "\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_short(name: str, short: str) -> None:
    assert short_name(name) == short


@given(st.text(min_size=1, max_size=80))
def test_any_name_stays_a_name_that_fits(name: str) -> None:
    assert len(short_name(name, 20)) <= 20
    assert short_name("_ZN" + name)
