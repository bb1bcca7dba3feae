"""The page: well-formed, self-contained, and safe whatever kernels are called."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from xml.etree import ElementTree

from epfuse.profiling.classify import Classifier
from epfuse.profiling.page import CLASSES, profile_page, timeline_svg
from epfuse.profiling.profile import profile_trace
from epfuse.profiling.read_trace import read_trace
from epfuse.profiling.record import Profile
from epfuse.profiling.shapes import SHAPES
from epfuse.profiling.timeline import WIDTH, draw_timeline
from tests.profiling.traces import MI300X, TraceFile, server_step

HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}\"'&"
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Remembers elements and that each one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.seen
    assert not re.search(r"""(src|href)=|url\(|@import""", page)
    return checker


def test_the_real_trace(classifier: Classifier) -> None:
    profiles = profile_trace(read_trace(MI300X), classifier, shape=SHAPES["gpt-oss-20b"])
    page = profile_page(profiles, comparison=False)
    checker = check(page)
    assert checker.seen.count("svg") == 3  # the step, a layer, all layers
    assert page.count("<tr><td><span") == 10
    assert "predicted: if these experts were w8a16" in page
    for text in ("3272.7", "3761.9", "425", "expert GEMM 2", "MI300X"):
        assert text in page


def test_names_are_escaped(profile: Callable[..., Profile]) -> None:
    trace = TraceFile()
    server_step(trace, "execute_context_0(0)_generation_1(1)", 100)
    trace.kernel(HOSTILE, 150, 40, correlation=1)
    trace.range(HOSTILE, 79, 10)
    got = profile(trace)
    assert any(kernel.name == HOSTILE for kernel in got.unclassified)
    page = profile_page([got], comparison=False)
    check(page)
    assert "<script>" not in page
    assert "{{ 7 * 7 }}" in page


def test_two_profiles_side_by_side(classifier: Classifier) -> None:
    profiles = profile_trace(read_trace(MI300X), classifier) * 2
    page = profile_page(profiles, comparison=True)
    check(page)
    assert "Side by side" in page
    assert page.count("1.00</td>") >= 11


def test_a_trace_without_layers_has_a_page(profile: Callable[..., Profile]) -> None:
    trace = TraceFile()
    trace.kernel("strange", 0, 0)
    check(profile_page([profile(trace)], comparison=False))


def test_every_phase_has_a_colour(classifier: Classifier) -> None:
    (profile,) = profile_trace(read_trace(MI300X), classifier)
    page = profile_page([profile], comparison=False)
    for css in CLASSES.values():
        assert page.count(f"--{css}: #") == 2  # light and dark


def test_the_timeline_fits(classifier: Classifier) -> None:
    (profile,) = profile_trace(read_trace(MI300X), classifier)
    timeline = draw_timeline(profile.timeline)
    for box in timeline.boxes:
        assert 0 <= box.x <= box.x + box.width <= WIDTH
    assert [tick.label for tick in timeline.ticks][:2] == ["0 us", "100 us"]
    assert timeline.widened == 0
    picture = ElementTree.fromstring(timeline_svg(profile))
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}title")) == len(profile.timeline)


def test_a_layer_of_short_kernels_says_that_they_are_drawn_wider(profile: Callable[..., Profile]) -> None:
    trace = TraceFile()
    trace.range("execute_context_0(0)_generation_1(1)", 0, 9_000)
    for layer in range(2):
        at = 100 + 3_000 * layer
        for name, start, dur in (
            ("long_kernel", at, 1_000),
            ("short_kernel", at + 2_000, 1),
            ("last_kernel", at + 2_500, 9),
        ):
            trace.kernel(name, start, dur, correlation=trace.launch(start - 20, 2))
    page = profile_page([profile(trace)], comparison=False)
    assert "1 of its 3 kernels are drawn wider than they ran, to be seen</figcaption>" in page
