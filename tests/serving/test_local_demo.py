from __future__ import annotations

import pytest

from epfuse.errors import ConfigError
from epfuse.serving import local_demo
from epfuse.serving.local_demo import prepare
from epfuse.serving.point import PutIn


def test_six_points_and_a_comparison_at_one_of_them(tmp_path):
    folder = prepare(tmp_path / "run", "transformers", "demo")
    run = folder.read_run()
    assert "not vLLM" in run.label
    assert run.recipe == "epfuse's transformers.yaml"
    assert len(run.points) == 6
    assert (run.compare.baseline, run.compare.candidate) == ("eager", "epfuse")
    found = [folder.read_job(name) for name in run.points]
    assert [len(job.order) for job in found] == [2, 2, 2, 2, 2, 8]
    assert found[-1].order[:4] == ("eager", "epfuse", "epfuse", "eager")
    for job in found:
        assert job.label == run.label
        assert job.gate.prompts
        assert job.gpus == 0
        assert [arm.server.argv[-1] for arm in job.arms] == ["eager", "epfuse"]
        assert all(arm.epfuse is PutIn.NOT for arm in job.arms)
    with pytest.raises(ConfigError, match="has a run already"):
        prepare(tmp_path / "run", "transformers", "demo")


def test_vllm_on_a_cpu_says_that_both_arms_have_our_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(local_demo, "_write_model", lambda environment, model: model.mkdir())
    folder = prepare(tmp_path / "run", "vllm", "demo", tmp_path / "venv")
    run = folder.read_run()
    assert "epfuse's experts in both arms" in run.label
    jobs = [folder.read_job(name) for name in run.points]
    assert [len(job.order) for job in jobs] == [1, 1, 1, 1, 1, 4]
    *_, compared = jobs
    model = str((tmp_path / "run" / "model").absolute())
    for arm in compared.arms:
        assert arm.server.argv[:3] == ("vllm", "serve", model)
        assert arm.environment.path == str(tmp_path / "venv")
        assert arm.server.env["VLLM_PLUGINS"] == "m3_on_cpu,epfuse"
    assert ["--enable-expert-parallel" in arm.server.argv for arm in compared.arms] == [False, True]
    assert compared.needs == (model,)
    assert compared.point.model == model


def test_without_vllm_its_demo_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(local_demo, "vllm_environment", lambda: None)
    with pytest.raises(ConfigError, match="vLLM for CPUs is not installed"):
        prepare(tmp_path / "run", "vllm", "demo")
    assert not (tmp_path / "run" / "run.json").exists()
