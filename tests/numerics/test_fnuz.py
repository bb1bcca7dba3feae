"""E4M3FN -> E4M3FNUZ against torch's own float8_e4m3fnuz."""

from __future__ import annotations

import pytest
import torch

from epfuse.errors import ConfigError, DtypeError, EpfuseError
from epfuse.numerics.fnuz import fn_codes_to_fnuz, normalize_to_fnuz, normalize_to_fnuz_
from epfuse.numerics.mxfp8 import decode
from tests.numerics.formats import same


def every_code_with_scales(device: torch.device, scales: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.arange(256, dtype=torch.uint8).expand(len(scales), 256).contiguous()
    rows = torch.tensor(scales, dtype=torch.uint8).view(-1, 1).expand(-1, 8).contiguous()
    return codes.to(device).view(torch.float8_e4m3fn), rows.to(device)


ALLOWED = [*range(254), 255]


def test_every_code_means_half_the_value(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    fn, fnuz = codes.view(torch.float8_e4m3fn).float(), fn_codes_to_fnuz(codes).view(torch.float8_e4m3fnuz).float()
    assert same(fnuz + 0.0, fn / 2 + 0.0)  # + 0.0: FNUZ has no -0
    assert fn.isnan().sum() == 2
    # every half is a FNUZ number, and torch's own rounding to FNUZ finds the same code
    assert torch.equal((fn / 2).to(torch.float8_e4m3fnuz).view(torch.uint8), fn_codes_to_fnuz(codes))


@pytest.mark.parametrize("normalize", [normalize_to_fnuz, normalize_to_fnuz_])
def test_every_code_with_every_scale_keeps_its_value(normalize, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    values, scales = every_code_with_scales(device, ALLOWED)
    before = decode(values, scales, torch.float64)
    fnuz, doubled = normalize(values, scales)
    assert fnuz.dtype == torch.float8_e4m3fnuz
    assert doubled[:, 0].tolist() == [*range(1, 255), 255]
    assert same(decode(fnuz, doubled, torch.float64), before + 0.0)
    assert (fnuz.data_ptr() == values.data_ptr()) is (normalize is normalize_to_fnuz_)
    assert (doubled.data_ptr() == scales.data_ptr()) is (normalize is normalize_to_fnuz_)


@pytest.mark.parametrize("normalize", [normalize_to_fnuz, normalize_to_fnuz_])
def test_scale_254_is_refused_and_nothing_is_overwritten(normalize, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    values, scales = every_code_with_scales(device, [1, 254])
    kept_values, kept_scales = values.clone(), scales.clone()
    with pytest.raises(ConfigError, match="254"):
        normalize(values, scales)
    assert torch.equal(values.view(torch.uint8), kept_values.view(torch.uint8))
    assert torch.equal(scales, kept_scales)
    assert issubclass(ConfigError, EpfuseError)


@pytest.mark.parametrize("normalize", [normalize_to_fnuz, normalize_to_fnuz_])
def test_other_dtypes_are_refused(normalize, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    values, scales = every_code_with_scales(device, [1])
    with pytest.raises(DtypeError, match="values has dtype"):
        normalize(values.view(torch.float8_e4m3fnuz), scales)
    with pytest.raises(DtypeError, match="scales has dtype"):
        normalize(values, scales.float())
    assert torch.equal(normalize(values, scales.view(torch.float8_e8m0fnu))[1].cpu(), torch.full((1, 8), 2).byte())
