"""InferenceX' master files: both layouts, what is unknown is said, what is ambiguous is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from epfuse.errors import ConfigError
from epfuse.serving.inferencex import import_master
from epfuse.serving.matrix import Selection, expand

HEAD = """\
{key}:
  image: vllm:1
  model: org/{key}
  model-prefix: minimaxm3
  runner: mi300x
  precision: fp8
  framework: vllm
  multinode: false
"""
LENGTHS = """\
- isl: 1024
  osl: 1024
  search-space:
  - {tp: 8, conc-start: 1, conc-end: 128}
  - {tp: 8, ep: 8, conc-start: 256, conc-end: 256}
- isl: 8192
  osl: 1024
  search-space:
  - {tp: 8, conc-start: 1, conc-end: 64}
  - {tp: 8, ep: 8, conc-start: 128, conc-end: 256}
"""


def old(key: str = "m3", lengths: str = LENGTHS) -> str:
    return HEAD.replace("{key}", key) + "  seq-len-configs:\n" + indented(lengths, 2)


def new(key: str = "m3", lengths: str = LENGTHS, more: str = "") -> str:
    return HEAD.replace("{key}", key) + "  scenarios:\n    fixed-seq-len:\n" + indented(lengths, 4) + more


def indented(text: str, by: int) -> str:
    return "".join(" " * by + line + "\n" for line in text.splitlines())


def write(folder: Path, text: str, name: str = "master.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


AGENTIC = "    agentic-coding:\n    - duration: 1800\n      search-space:\n      - {tp: 8, offloading: none}\n"


@pytest.mark.parametrize(("text", "layout"), [(old(), 1), (new(), 2), (new(more=AGENTIC), 2)])
def test_both_layouts_give_the_seed_s_points(tmp_path: Path, text: str, layout: int) -> None:
    found = import_master([write(tmp_path, text)])
    assert found.layouts == {layout}
    assert len(expand(found.matrix, {})) == 18
    six = expand(found.matrix, {}, Selection(concurrencies=(1, 16, 256)))
    assert [(row.isl, row.conc, row.ep, row.is_eval) for row in six] == [
        (1024, 1, 1, False), (1024, 16, 1, False), (1024, 256, 8, False),
        (8192, 1, 1, False), (8192, 16, 1, False), (8192, 256, 8, True),
    ]  # fmt: skip
    assert found.skipped == (["m3: ignored scenarios.agentic-coding"] if text.endswith(AGENTIC) else [])


def test_what_is_unknown_is_skipped_and_said(tmp_path: Path) -> None:
    text = new("a", LENGTHS.replace("{tp: 8, conc-start: 1, conc-end: 128}", "{tp: 8, dcp-size: 2, conc-list: [1]}"))
    text += "  owner: someone\n"
    text += new("b", LENGTHS.replace("conc-end: 64", "conc-end: sixty"))
    text += new("c").replace("    fixed-seq-len:\n", "    agentic-coding:\n")
    text += "d: 7\ne: {image: x}\n"
    found = import_master([write(tmp_path, text)])
    assert list(found.matrix) == ["a"]
    assert len(expand(found.matrix, {})) == 10
    assert found.skipped == [
        "a: ignored owner",
        "a: skipped a row of 1024/1024 that has dcp-size",
        "b: skipped, seq-len-configs.1.search-space.0.conc-end: Input should be a valid integer",
        "c: skipped, it has no fixed-seq-len",
        "d: skipped, it is of type int",
        "e: skipped, it has neither seq-len-configs nor scenarios",
    ]


def test_a_key_in_two_files_is_an_error(tmp_path: Path) -> None:
    files = [write(tmp_path, old(), "a.yaml"), write(tmp_path, new(), "b.yaml")]
    with pytest.raises(ConfigError, match=r"'m3' stands in .*a\.yaml and in .*b\.yaml"):
        import_master(files)


def test_a_key_twice_in_one_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        import_master([write(tmp_path, old() + old())])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml can't be read"):
        import_master([tmp_path / "none.yaml"])


def test_a_star_in_a_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has a \*"):
        import_master([write(tmp_path, old("'m3-*'"))])


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "a: 1", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")]
)
def test_what_is_no_master_file_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"master"):
        import_master([write(tmp_path, text)])


def test_the_command_says_what_it_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, new("m3-x", more=AGENTIC))
    arguments = ["serve", "plan", "minimaxm3-mi300x", "--matrix", str(path), "--six", "--key", "m3-*"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "ignored scenarios.agentic-coding" in result.stderr
    assert "minimaxm3_8k1k-c256-tp8-ep8" in result.stdout
    assert "org/m3-x" in result.stdout
