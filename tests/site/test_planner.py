"""The planner's page says what ``epfuse plan --json`` says, for several models, GPUs and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from click.testing import CliRunner

from epfuse.cli.main import main
from tests.site.conftest import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CASES = [
    ("gpt-oss-120b", "h200", 2, 64),
    ("minimax-m3", "h200", 8, 256),
    ("minimax-m3", "mi300x", 8, 16),
    ("minimax-m3", "mi355x", 4, 1),
    ("qwen3-30b-a3b-fp8", "h100", 4, 1024),
    ("mixtral-8x7b", "mi325x", 8, 8192),
    ("deepseek-v3", "h100", 2, 32),  # does not fit
    ("jamba-1.5-mini", "h200", 32, 1),  # more ranks than experts
]
SHARE = 60


def answer(model: str, device: str, ranks: int, *more: str) -> Any:
    words = ("--config", model, "--device", device, "--ep-size", str(ranks), "--max-model-len", "9472", *more)
    return CliRunner().invoke(main, ["plan", *words])


def expected(model: str, device: str, ranks: int, tokens: int) -> dict[str, str]:
    """Key of a figure -> its text."""
    ended = answer(model, device, ranks, "--json")
    if ended.exit_code:
        return {"refusal": ended.stderr.strip().splitlines()[-1].removeprefix("epfuse: ").removeprefix("Error: ")}
    plan = json.loads(ended.stdout)
    sizes = {name: size for name, size in plan["bytes_per_rank"].items() if name != "chosen"}
    found = {f"bytes.{name}": f"{size / 1e9:.1f} GB" for name, size in sizes.items()}
    found |= {f"fits.{name}": "fits" if fits else "does not fit" for name, fits in plan["memory"]["fits"].items()}
    found["budget"] = f"{plan['memory']['expert_budget'] / 1e9:.1f} GB"
    for part in plan["ranges"]:
        if part["min_tokens"] <= tokens and tokens <= (part["max_tokens"] or tokens):
            found |= {"path": part["path"], "tile": part["tile"]}
            break
    else:
        found["left"] = plan["refused"][0]["reason"]
    (now,) = [time for time in plan["times"] if time["tokens"] == tokens]
    times = {"epfuse": now["epfuse"], "vllm": now["vllm"], "floor": now["floor_us"] and {"us": now["floor_us"]}}
    found |= {f"time.{name}": shown(time) for name, time in times.items()}
    if now["epfuse"] and now["vllm"]:
        gain = 1 / (1 - SHARE / 100 + SHARE / 100 * now["epfuse"]["us"] / now["vllm"]["us"])
        found["gain"] = f"{gain:.2f} \N{MULTIPLICATION SIGN}"
    return found


def shown(time: dict[str, Any] | None) -> str:
    if not time:
        return "\N{EN DASH}"
    return f"{time['us'] / 1000:.2f} ms" if time["us"] >= 1000 else f"{time['us']:.1f} µs"


def figures(page: Page) -> dict[str, str]:
    return dict(
        page.eval_on_selector_all(
            ".planner [data-key]", "found => found.map(each => [each.dataset.key, each.textContent])"
        )
    )


def state(model: str, device: str, ranks: int, tokens: int) -> str:
    chosen = {"model": model, "device": device, "ranks": ranks, "tokens": tokens, "share": SHARE}
    return urlencode(chosen)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_page_says_what_the_command_says(browser: Browser, address: str, case: tuple[str, str, int, int]) -> None:
    with browser.new_context() as context, context.new_page() as page:
        page.goto(f"{address}planner/#{state(*case)}")
        page.locator(".planner[data-shown]").wait_for()
        found, right = figures(page), expected(*case)
    if "refusal" in right:
        assert found["refusal"] == right["refusal"]
        assert "time.epfuse" not in found
    else:
        for key, text in right.items():
            assert close(found.get(key), text), (key, found.get(key), text)
        assert set(found) == set(right)


def test_gpt_oss_on_two_h200s(browser: Browser, address: str) -> None:
    with browser.new_context() as context, context.new_page() as page:
        page.goto(f"{address}planner/#{state('gpt-oss-120b', 'h200', 2, 64)}")
        page.locator(".planner[data-shown]").wait_for()
        found = figures(page)
        marks = page.locator(".planner-time.epfuse .planner-mark").all_text_contents()
    assert found["fits.mxfp8"] == "fits"
    assert found["time.epfuse"].endswith(" µs")
    assert marks == ["predicted"]


def close(found: str | None, right: str) -> bool:
    """Equal, but for the last digit that JavaScript and Python may round apart."""
    if found is None or found == right:
        return found == right
    first, second = found.split(" ", 1), right.split(" ", 1)
    return first[1:] == second[1:] and abs(float(first[0]) - float(second[0])) < 0.11


def test_choosing_changes_what_is_shown_and_the_address(browser: Browser, address: str) -> None:
    with browser.new_context() as context, context.new_page() as page:
        page.goto(f"{address}planner/")
        page.locator(".planner[data-shown]").wait_for()
        before = figures(page)
        page.locator("select[name=device]").select_option("h200")
        page.locator(".planner[data-shown*=h200]").wait_for()
        assert figures(page) != before
        assert "device=h200" in page.url
        page.locator("input[name=share]").fill("75")
        page.locator(".planner[data-shown$=' 75']").wait_for()
        assert page.evaluate("document.activeElement.name") == "share"
        assert page.locator("select[name=model] option").count() >= 30


def test_one_plan_as_a_page_of_its_own(browser: Browser, tmp_path: Path) -> None:
    ended = answer("gpt-oss-120b", "h200", 2, "--html", str(tmp_path / "plan.html"))
    assert ended.exit_code == 0, ended.output
    seen: list[str] = []
    with served(tmp_path) as address, browser.new_context() as context, context.new_page() as page:
        page.on("request", lambda request: seen.append(request.url))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(f"{address}plan.html#tokens=64&share={SHARE}")
        page.locator(".planner[data-shown]").wait_for()
        assert figures(page) == expected("gpt-oss-120b", "h200", 2, 64)
    assert [url for url in seen if not url.endswith("/favicon.ico")] == [f"{address}plan.html"]
