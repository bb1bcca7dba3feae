"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from epfuse.cli.main import main
from epfuse.parallel.group import EPGroup

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_api_example() -> None:
    example, _ = examples()
    assert len(example.strip().splitlines()) <= 14  # it is read in one look
    names: dict[str, object] = {}
    try:
        exec(compile(example, str(README), "exec"), names)
    finally:
        torch.set_default_device(None)  # the example sets it
    y = names["y"]
    assert isinstance(y, torch.Tensor)
    assert y.shape == (37, 256)
    assert y.isfinite().all()
    assert y.any()


def test_transformers_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, on one rank: the first model runs epfuse's experts, the second holds this rank's share of them."""
    _, example = examples()
    assert len(example.strip().splitlines()) <= 10
    folder = tmp_path / "small"
    made = CliRunner().invoke(
        main, ["checkpoint", "make", "--family", "minimax_m3_vl_text", "--format", "bf16", "--out", str(folder)]
    )
    assert made.exit_code == 0, made.output
    monkeypatch.setattr(EPGroup, "current", EPGroup.single)
    models = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **more: models.append(load(*args, **more)) or models[-1]
    )
    exec(compile(example, str(README), "exec"), {"folder": folder})
    registered, replaced = models
    tokens = torch.arange(5)[None]
    assert registered.config._experts_implementation == "epfuse"
    with torch.no_grad():
        one, other = (model(tokens).logits for model in models)
        registered.set_experts_implementation("eager")
        eager = registered(tokens).logits
    assert registered is not replaced
    for mine in (one, other):
        assert (mine - eager).norm() < 0.02 * eager.norm()
