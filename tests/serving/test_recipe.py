"""Recipes: the shipped ones give the seed's jobs; a fault in a file has its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from epfuse.errors import ConfigError
from epfuse.serving.matrix import Selection, expand
from epfuse.serving.plan import abba, jobs, resolve
from epfuse.serving.point import Image, PointJob, PutIn
from epfuse.serving.recipe import Recipe, load_recipe, shipped_recipes

MI300X = load_recipe("minimaxm3-mi300x")


def planned(recipe: Recipe, six: bool = False, **how: object) -> list[PointJob]:
    selection = Selection(concurrencies=recipe.six if six else ())
    return jobs(recipe, expand(recipe.matrix, recipe.runners, selection), "run", **how)  # type: ignore[arg-type]


def test_six_of_the_seed() -> None:
    found = [(job.point.isl, job.point.concurrency, job.point.tp, job.point.ep) for job in planned(MI300X.recipe, True)]
    assert found == [
        (1024, 1, 8, 1), (1024, 16, 8, 1), (1024, 256, 8, 8), (8192, 1, 8, 1), (8192, 16, 8, 1), (8192, 256, 8, 8),
    ]  # fmt: skip
    six = [job.point for job in planned(MI300X.recipe, True)]
    assert [point.max_model_len for point in six] == [2304] * 3 + [9472] * 3
    assert [point.name for point in six if point.is_eval] == ["minimaxm3_8k1k-c256-tp8-ep8"]
    assert {point.osl for point in six} == {1024}


def test_all_eighteen() -> None:
    found = [job.point for job in planned(MI300X.recipe)]
    assert len(found) == len({point.name for point in found}) == 18
    assert [(p.isl, p.concurrency) for p in found if p.ep == 8] == [(1024, 256), (8192, 128), (8192, 256)]
    assert {point.tp for point in found} == {8}


def test_the_seed_s_command_environment_and_load() -> None:
    job = planned(MI300X.recipe, True)[-1]
    server = job.arms[0].server
    words = " ".join(server.argv)
    assert words.startswith(
        "vllm serve MiniMaxAI/MiniMax-M3-MXFP8 --port {port} --tensor-parallel-size 8 --enable-expert-parallel "
        "--max-model-len 9472 --block-size 128 --no-enable-prefix-caching --language-model-only "
        "--attention-backend TRITON_ATTN"
    )
    assert server.env["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "0"
    assert server.env["VLLM_ENGINE_READY_TIMEOUT_S"] == "3600"
    assert server.env["VLLM_PLUGINS"] == ""
    assert "--enable-expert-parallel" not in planned(MI300X.recipe, True)[0].arms[0].server.argv
    assert (job.client.prompts, job.client.warmups, job.client.concurrency) == (2560, 512, 256)
    assert (job.client.seed, job.client.request_rate, job.client.percentiles) == (0, None, (90.0, 99.0, 99.9))
    assert (job.gpus, job.gpu_vendor, job.gate.floor, job.gate.evals) == (8, "amd", 0.9, ("gsm8k",))
    assert isinstance(job.arms[0].environment, Image)
    assert job.arms[0].environment.reference == "vllm/vllm-openai-rocm:minimax-m3"


def test_with_and_without_epfuse_differ_in_what_the_recipe_says_and_nothing_else() -> None:
    for name in ("minimaxm3-mi300x", "minimaxm3-h200"):
        (job, *_) = planned(load_recipe(name).recipe, pairs=2)
        baseline, candidate = job.arms
        assert (baseline.epfuse, candidate.epfuse) == (PutIn.NOT, PutIn.PLUGIN)
        assert baseline.server.argv == candidate.server.argv
        changed = {k for k, v in candidate.server.env.items() if baseline.server.env.get(k) != v}
        assert changed <= {"VLLM_PLUGINS", "VLLM_ROCM_USE_AITER_MOE", "EPFUSE_STRICT"}
        assert candidate.server.env["VLLM_PLUGINS"] == "epfuse"


def test_attention_in_copies_is_tp_1_and_data_parallel() -> None:
    text = MINIMAL.replace("{tp: 8, conc-list: [4]}", "{tp: 8, ep: 8, dp-attn: true, conc-list: [4]}")
    text = text.replace("gpu_vendor: none", "gpu_vendor: amd")
    (job,) = planned(_parse(text))
    words = " ".join(job.arms[0].server.argv)
    assert "--tensor-parallel-size 1 --data-parallel-size 8 --enable-expert-parallel" in words
    assert job.gpus == 8


def test_abba() -> None:
    assert abba("a", "b", 2) == ("a", "b", "b", "a")
    assert abba("a", "b", 3) == ("a", "b", "b", "a", "a", "b")
    assert planned(MI300X.recipe, True, pairs=2)[0].order == ("baseline", "candidate", "candidate", "baseline")
    assert planned(MI300X.recipe, True)[0].order == ("baseline",)
    with pytest.raises(ConfigError, match="arm is 'x'"):
        planned(MI300X.recipe, True, arms=("x",))


def test_the_run_has_the_cheapest_point_as_its_canary() -> None:
    run = resolve(MI300X, planned(MI300X.recipe, True, pairs=2))
    assert run.canary == "minimaxm3_1k1k-c1-tp8"
    assert run.compare is not None
    assert len(run.points) == 6
    assert resolve(MI300X, planned(MI300X.recipe, True)).compare is None


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_reads_and_says_what_it_is(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert len(loaded.recipe.about) > 40
    assert planned(loaded.recipe)
    assert planned(loaded.recipe, six=True)


MINIMAL = """\
schema: 1
name: tiny
gpu_vendor: none
matrix:
  m3-fp8:
    image: x
    model: m
    model-prefix: m3
    precision: fp8
    framework: vllm
    runner: cpu
    seq-len-configs:
    - isl: 64
      osl: 16
      search-space:
      - {tp: 8, conc-list: [4]}
arms:
- name: baseline
"""


def _load(text: str, folder: Path) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load_recipe(str(folder / "r.yaml")).recipe


def _parse(text: str) -> Recipe:
    from epfuse.serving.recipe import parse

    return parse(text.encode(), Recipe, "recipe", "r.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("gpu_vendor: none", "gpu_vendor: none\nextra: 1", 4, "extra: this key is unknown"),
        ("    image: x", "    image: x\n    imag: y", 7, "matrix.m3-fp8.imag: this key is unknown"),
        ("{tp: 8,", "{tp: eight,", 16, "search-space.0.tp"),
        ("conc-list: [4]", "conc-list: [0]", 16, "conc-list"),
        ("conc-list: [4]", "conc-list: [4], extra: 1", 16, "extra: this key is unknown"),
        ("  m3-fp8:", "  'm3-*':", 6, "matrix.m3-*"),
        ("arms:\n", "environment: {kind: image, engine: lxc, reference: x}\narms:\n", 17, "environment.engine"),
        ("arms:\n", "runners: {h200: [a]}\narms:\n", 1, "runner 'cpu'"),
        ("name: baseline", "name: Base line", 18, "arms.0.name"),
        ("schema: 1", "schema: 2", 1, "schema"),
        ("    model: m\n", "    model: --help\n", 7, "matrix.m3-fp8.model"),  # an option of vllm serve
        ("    image: x", "    image: -v=/:/host", 6, "matrix.m3-fp8.image"),  # one of docker
        ("arms:\n", "model: -h\narms:\n", 17, "model"),
        ("arms:\n", "fatal: ['(']\narms:\n", 17, "fatal.0: Value error, it is no regular expression"),
        ("arms:\n", "gate: {factor: true}\narms:\n", 17, "gate.factor"),
        ("arms:\n", "client: {shortest_share: true}\narms:\n", 17, "client.shortest_share"),
        ("arms:\n", "deadlines: {ready: '60'}\narms:\n", 17, "deadlines.ready"),
        ("arms:\n", "slurm: {exclusive: 'no'}\narms:\n", 17, "slurm.exclusive"),
        ("conc-list: [4]", "conc-list: [4], dp-attn: 'yes'", 16, "dp-attn"),
        ("- name: baseline", "- name: candidate\n- name: baseline", 1, "must stand before its candidate"),
        ("- name: baseline", "- name: a\n- name: b\ncompare: {baseline: a, candidate: a}", 1, "must stand before"),
    ],
)
def test_a_fault_has_file_line_and_key(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _load(MINIMAL.replace(old, new), tmp_path)
    assert f"r.yaml, line {line}: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "name: again\n", "stands twice"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"{x}: &{x} [{', '.join(['*' + y] * 10)}]\n"
         for y, x in zip("abcdefg", "bcdefgh", strict=True)), "values"),
        ("a: " + "[" * 5000, "not YAML"),
        ("a: !!python/object/apply:os.system [true]", "not YAML"),
        ("\x00", "not YAML"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _load(text, tmp_path)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="is no file; shipped recipes are"):
        load_recipe("nowhere/x.yaml")


def test_several_nodes_and_speculation_can_be_planned_but_not_run() -> None:
    with pytest.raises(ConfigError, match="spec-decoding 'mtp'"):
        planned(_parse(MINIMAL.replace("{tp: 8,", "{tp: 8, spec-decoding: mtp,")))


def test_an_ep_that_vllm_has_not_is_refused_and_not_silently_another() -> None:
    with pytest.raises(ConfigError, match="ep 4 and tp 8"):
        planned(_parse(MINIMAL.replace("{tp: 8,", "{tp: 8, ep: 4,")))


def test_any_server_command_gets_the_point() -> None:
    text = MINIMAL + "server: {command: [python, -m, x, --port, '{port}', --len, '{max_model_len}', 7]}\n"
    server = planned(_parse(text))[0].arms[0].server
    assert server.argv == ("python", "-m", "x", "--port", "{port}", "--len", "336", "7")
    assert (server.env["CONC"], server.env["RANDOM_RANGE_RATIO"]) == ("4", "0.8")


@pytest.mark.parametrize("arms", [("candidate",), ("candidate", "baseline")])
def test_an_arm_without_its_baseline_before_it_is_refused(arms: tuple[str, ...]) -> None:
    """It would be compared with itself, and pass whatever it answers."""
    with pytest.raises(ConfigError, match="--arm baseline,candidate"):
        planned(MI300X.recipe, True, arms=arms)
    assert planned(MI300X.recipe, True, arms=("baseline", "candidate"))[0].order == ("baseline", "candidate")


def test_nodes_of_any_name_give_points_with_names() -> None:
    recipe = _parse(MINIMAL.replace("arms:\n", "runners: {cpu: ['-Rack 1/A', 'rack 1/B; rm']}\narms:\n"))
    rows = expand(recipe.matrix, recipe.runners, Selection(node="ack"))
    found = jobs(recipe, rows, "run")
    assert [job.point.name for job in found] == ["m3-fp8_-rack-1-a_64_16-c4-tp8", "m3-fp8_rack-1-b-rm_64_16-c4-tp8"]
    assert [job.node for job in found] == ["-Rack 1/A", "rack 1/B; rm"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("conc-list: [4]", "conc-list: [16777216]", "key 'm3-fp8', 64/16 c16777216: prompts"),
        ("osl: 16", "osl: 1", "can't draw lengths up to 1"),
    ],
)
def test_what_is_no_point_is_refused_by_its_key(old: str, new: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(_parse(MINIMAL.replace(old, new)))


def test_words_and_variables_are_as_they_are_written() -> None:
    """YAML reads 010 as 8, 1.10 as 1.1 and 22:22 as 1342."""
    text = MINIMAL + "  env: &env {A: 010, B: 1.10, C: 22:22, D: 0x10, E: text}\n  arguments: [--x, 0.90, 7, 1e3]\n"
    text += "- name: candidate\n  env: *env\nserver:\n  env: {F: 1_000}\nclient: {command: [bench, 3.10]}\n"
    job = planned(_parse(text), arms=("baseline", "candidate"))[0]
    for arm in job.arms:
        words = {"A": "010", "B": "1.10", "C": "22:22", "D": "0x10", "E": "text", "F": "1_000"}
        assert words.items() <= arm.server.env.items()
    assert job.arms[0].server.argv[-4:] == ("--x", "0.90", "7", "1e3")
    assert job.client.command == ("bench", "3.10")
