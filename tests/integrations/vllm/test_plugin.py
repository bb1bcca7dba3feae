"""Whether to register at all; no vLLM is needed to say no."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest

from epfuse.environment import environment
from epfuse.errors import ConfigError
from epfuse.integrations import installed as found
from epfuse.integrations.vllm import plugin, releases


@pytest.fixture
def said(monkeypatch):
    """What the plugin logs, and a fresh process's state."""
    plugin._register_once.cache_clear()
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(plugin.log, "info", lambda form, *args: lines.append((logging.INFO, form % args)))
    monkeypatch.setattr(plugin.log, "warning", lambda form, *args: lines.append((logging.WARNING, form % args)))
    monkeypatch.setattr(plugin.log, "exception", lambda form, *args: lines.append((logging.ERROR, form % args)))
    yield lines
    plugin._register_once.cache_clear()


def test_without_a_package_it_stands_down_with_one_warning(said, monkeypatch):
    monkeypatch.setattr(releases, "package", lambda: None)
    for _ in range(3):
        plugin.register()
    ((level, text),) = said
    assert level == logging.WARNING
    assert ", ".join(releases.TESTED) in text
    assert "its package can't be found" in text
    assert "EPFUSE_VLLM_FORCE=1" in text


def test_disabled_it_looks_at_nothing(said, monkeypatch):
    monkeypatch.setenv("EPFUSE_DISABLE", "1")
    monkeypatch.setattr(releases, "installed", lambda: 1 / 0)
    plugin.register()
    ((level, text),) = said
    assert level == logging.INFO
    assert "EPFUSE_DISABLE=1" in text


def test_an_error_is_logged(said, monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda: 1 / 0)
    plugin.register()
    assert [level for level, _ in said] == [logging.ERROR]


def test_strict_raises(said, monkeypatch):
    monkeypatch.setenv("EPFUSE_STRICT", "1")
    monkeypatch.setattr(releases, "installed", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugin.register()
    assert not said


def test_a_switch_is_0_or_1(monkeypatch):
    from epfuse.integrations.switches import FORCE, is_on

    monkeypatch.setenv(FORCE, "yes")
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        is_on(FORCE)


def test_metadata_without_a_version(monkeypatch):
    monkeypatch.setattr(found, "version", lambda name: None)
    assert releases.installed() == "unknown"


def test_without_metadata_the_version_is_unknown(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(found, "version", missing)
    assert releases.installed() == "unknown"


def test_the_entry_point_is_declared():
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="epfuse")
    if not points:
        pytest.skip("epfuse is not installed, or was before it had the entry point")
    assert next(iter(points)).load() is plugin.register


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def printed(said, monkeypatch):
    """What vLLM's handler prints."""
    monkeypatch.setattr(releases, "package", lambda: None)
    ours, theirs = logging.getLogger("epfuse"), logging.getLogger("vllm")
    handler = Lines()
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "propagate", False)
    for name, value in (("handlers", []), ("propagate", True), ("level", ours.level)):
        monkeypatch.setattr(ours, name, value)
    environment.cache_clear()
    yield handler.lines
    environment.cache_clear()


def _root_prints_nothing(monkeypatch):
    """In the test itself: pytest gives the root logger handlers for each of a test's phases."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_what_the_package_itself_says_is_printed_once_by_vllms_handlers(printed, monkeypatch):
    _root_prints_nothing(monkeypatch)
    plugin.register()
    plugin._register_once.cache_clear()
    plugin.register()
    later = Lines()
    monkeypatch.setattr(logging.getLogger(), "handlers", [later])
    logging.getLogger("epfuse.policy.tiles").warning("foreign rows")
    assert (printed, later.lines) == (["foreign rows"], [])


def test_with_epfuse_log_a_line_is_printed_on_stderr_alone(printed, monkeypatch, capsys):
    _root_prints_nothing(monkeypatch)
    monkeypatch.setenv("EPFUSE_LOG", "info")
    plugin.register()
    environment()
    logging.getLogger("epfuse.policy.tiles").info("a tuned row")
    assert capsys.readouterr().err == "INFO epfuse.policy.tiles: a tuned row\n"
    assert printed == []


def test_a_vllm_that_leaves_logging_to_the_application(printed, monkeypatch):
    _root_prints_nothing(monkeypatch)
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [])
    plugin.register()
    assert logging.getLogger("epfuse").propagate
