"""Whether a vLLM fits, from what its classes look like; releases are imitated from their record."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from epfuse.integrations.interfaces import Match, ServerProject, What
from epfuse.integrations.vllm import plugin, releases
from epfuse.integrations.vllm.interfaces import USES, VLLM
from tests.integrations.vllm.fake import use_of, write_package

CONFIG = use_of("FusedMoEConfig", What.FIELDS)
APPLY = use_of("FusedMoEExpertsModular.apply", What.PARAMETERS)
HAVE_VLLM = importlib.util.find_spec("vllm") is not None


def test_the_record_has_every_tested_release_and_all_that_is_used():
    assert tuple(VLLM.known) == releases.TESTED
    for interfaces in VLLM.known.values():
        assert list(interfaces) == [str(use) for use in USES]
        assert all(interfaces.values())
        for use in USES:
            assert use.names <= set(interfaces[str(use)])


@pytest.mark.skipif(not HAVE_VLLM, reason="needs a vLLM on the path")
def test_the_record_is_what_the_release_has():
    assert VLLM.read(releases.package()) == VLLM.known[releases.installed()]
    assert VLLM.digests[VLLM.digest(releases.package())] == releases.installed()


@pytest.mark.skipif(not HAVE_VLLM, reason="needs a vLLM on the path")
def test_a_tested_release_is_known_without_parsing_it(monkeypatch):
    """Each process of a server asks when it starts; parsing takes half a second."""
    monkeypatch.setattr(ServerProject, "read", lambda *_: pytest.fail("it is parsed"))
    assert VLLM.nearest(releases.package()) == Match(releases.installed(), ())


@pytest.mark.skipif(not HAVE_VLLM, reason="needs a vLLM on the path")
def test_one_changed_byte_is_looked_at(tmp_path):
    for use in USES:
        (tmp_path / use.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / use.file).write_bytes((releases.package() / use.file).read_bytes())
    assert VLLM.digest(tmp_path) in VLLM.digests
    file = tmp_path / CONFIG.file
    file.write_text(file.read_text().replace("    num_experts: int\n", "    number_of_experts: int\n", 1))
    assert VLLM.digest(tmp_path) not in VLLM.digests
    assert f"{CONFIG} lacks num_experts and adds number_of_experts" in str(VLLM.nearest(tmp_path))


@pytest.mark.parametrize("release", releases.TESTED)
def test_an_imitated_release_is_known(release, tmp_path):
    write_package(tmp_path, release)
    assert VLLM.nearest(tmp_path).release == release
    assert VLLM.nearest(tmp_path).differences == ()


@pytest.mark.parametrize("use", USES, ids=str)
def test_each_part_that_goes_is_named(use, tmp_path):
    parts = VLLM.known["0.33.0"][str(use)]
    gone = next(part for part in reversed(parts) if f"{use.of}.{part}" not in {other.of for other in USES})
    write_package(tmp_path, "0.33.0", {use: tuple(part for part in parts if part != gone)})
    match = VLLM.nearest(tmp_path)
    assert match.release == "0.33.0"
    (difference,) = match.differences
    assert str(use) in difference
    assert gone in difference or difference.endswith("is missing")


def test_what_a_build_adds_to_the_configuration_counts(tmp_path):
    parts = VLLM.known["0.33.0"][str(CONFIG)]
    write_package(tmp_path, "0.33.0", {CONFIG: (*parts, "swiglu_offset")})
    assert str(VLLM.nearest(tmp_path)) == f"{CONFIG} adds swiglu_offset, compared with 0.33.0"


def test_what_a_build_adds_elsewhere_does_not(tmp_path):
    write_package(tmp_path, "0.32.0")
    file = tmp_path / CONFIG.file
    file.write_text("import os\nRANKS = 8\nif os:\n    def more(): ...\n" + file.read_text())
    assert not VLLM.nearest(tmp_path).differences


@pytest.mark.parametrize("content", [b"class FusedMoEConfig\n", b"\xff\xfe", b"\0", b"(" * 100_000, None], ids=str)
def test_a_file_that_is_no_source_is_missing(content, tmp_path):
    write_package(tmp_path, "0.33.0")
    file = tmp_path / CONFIG.file
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert any("FusedMoEConfig" in text and text.endswith("is missing") for text in VLLM.nearest(tmp_path).differences)


@pytest.fixture
def said(monkeypatch):
    """What the plugin logs, and a fresh process's state."""
    plugin._register_once.cache_clear()
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(plugin.log, "info", lambda form, *args: lines.append((logging.INFO, form % args)))
    monkeypatch.setattr(plugin.log, "warning", lambda form, *args: lines.append((logging.WARNING, form % args)))
    yield lines
    plugin._register_once.cache_clear()


@pytest.mark.parametrize("version", ["0.33.0.post1", "0.33.1.dev7+g1a2b3c4d", "0.33.0+rocm721", "unknown"])
def test_the_text_of_the_version_does_not_decide(version, said, tmp_path, monkeypatch):
    layer = pytest.importorskip("epfuse.integrations.vllm.stand_in")  # with a vLLM on the path
    write_package(tmp_path, "0.33.0")
    monkeypatch.setattr(releases, "installed", lambda: version)
    monkeypatch.setattr(releases, "package", lambda: tmp_path)
    monkeypatch.setattr(layer, "register_layer", lambda: True)
    plugin.register()
    ((level, text),) = said
    assert level == logging.INFO
    assert text.endswith(f"vLLM {version}, which looks like 0.33.0")


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0.post1", "0.34.0"])
def test_one_difference_stands_down_with_one_warning_that_names_it(version, said, tmp_path, monkeypatch):
    parts = VLLM.known["0.33.0"][str(APPLY)]
    write_package(tmp_path, "0.33.0", {APPLY: (*parts, "token_mask=")})
    monkeypatch.setattr(releases, "installed", lambda: version)
    monkeypatch.setattr(releases, "package", lambda: tmp_path)
    for _ in range(3):
        plugin.register()
    ((level, text),) = said
    assert level == logging.WARNING
    assert f"vLLM {version} is not as the releases" in text
    assert f"{APPLY} adds token_mask=, compared with 0.33.0" in text
    assert "EPFUSE_VLLM_FORCE=1" in text
