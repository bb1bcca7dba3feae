"""The file of fitted numbers: checked when it is read, and only for the product and path that it names."""

from __future__ import annotations

import json
from pathlib import Path as FilePath

import pytest

from epfuse import Path, Target
from epfuse.config import WeightFormat
from epfuse.errors import ConfigError
from epfuse.measured import store
from epfuse.measured.fits import fit_of, fit_path

ASKED = (Path.W8A16, WeightFormat.FRAGMENT)
SHIPPED = fit_path(store.TABLES, Target.SM90)


def test_a_folder_without_the_file_has_no_fit(tables: FilePath) -> None:
    assert not fit_path(tables, Target.SM90).exists()
    assert fit_of(Target.SM90, "NVIDIA H200", *ASKED) is None


def test_other_products_and_paths_have_none() -> None:
    assert fit_of(Target.SM90, "NVIDIA H200", *ASKED) is not None
    assert fit_of(Target.SM90, "NVIDIA H20", *ASKED) is None
    assert fit_of(Target.SM90, "NVIDIA H200", Path.BF16, WeightFormat.DENSE) is None
    assert fit_of(Target.GFX942, "AMD Instinct MI300X", *ASKED) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": 2.0}, "error"),
        ({"units": 0}, "units"),
        ({"numbers": {"read": -1.0}}, "numbers.read"),
        ({"numbers": {"read": 4.0}}, "other numbers"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_file_is_refused(tables: FilePath, change: dict[str, object], said: str) -> None:
    values = json.loads(SHIPPED.read_text())
    values["fits"][0] |= change
    path = fit_path(tables, Target.SM90)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=said):
        fit_of(Target.SM90, "NVIDIA H200", *ASKED)
