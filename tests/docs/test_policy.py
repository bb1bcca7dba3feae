"""docs/policy.md: what it names exists, and its example runs."""

from __future__ import annotations

import pathlib
import re

from epfuse import Path
from epfuse.config import Policy
from epfuse.environment import LogLevel, Switch
from epfuse.policy import Storage

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "policy.md").read_text()


def test_the_example_runs_and_says_what_it_says() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict[str, object] = {}
    exec(code, names)
    plan = names["plan"]
    assert plan.storage is Storage.MXFP8  # type: ignore[attr-defined]
    assert plan.reason.startswith("It holds the checkpoint's weights exactly")  # type: ignore[attr-defined]


def test_every_variable_and_value_is_there() -> None:
    rows = {name: row for name, row in re.findall(r"\| `(EPFUSE_\w+)` \|(.*?)\|", TEXT)}
    kinds = {"EPFUSE_POLICY": Policy, "EPFUSE_PATH": Path, "EPFUSE_LOG": LogLevel, "EPFUSE_NO_COMPILE": Switch,
             "EPFUSE_LAUNCH_PLANS": Switch}  # fmt: skip
    assert set(rows) == {*kinds, "EPFUSE_KERNELS"}
    for name, kind in kinds.items():
        assert set(re.findall(r"`([\w-]+)`", rows[name])) == {member.value for member in kind}
