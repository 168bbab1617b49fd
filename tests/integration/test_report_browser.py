"""report.html in a real browser: nothing is fetched, nothing complains, and it fits a phone. Needs a Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.report import write_report
from tests.browser import NAMES, Page, browser, open_browser
from tests.unit.report.rig import HOSTILE, STAGES, evaluation, make_run, write

pytestmark = pytest.mark.skipif(
    browser() is None, reason=f"needs {' or '.join(NAMES)} on the path, or GEMMA_TUNE_TEST_BROWSER"
)

NARROW, WIDE = 360, 1280


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of every stage, with an evaluation and text that would like to be more than text."""
    made = {}
    for stage in STAGES:
        run = make_run(tmp_path_factory.mktemp(stage) / "run", stage, text=HOSTILE, prompts=9)
        write(run / "evaluation.json", evaluation("a_task_of_a_very_long_name_" * 3))
        made[stage] = write_report(run)
    return made


def visit(deed: Callable[[Page], Awaitable[Any]]) -> Any:
    """Do `deed` with a fresh tab whose network and console are watched."""

    async def run() -> Any:
        async with open_browser() as page:
            for domain in ("Page", "Network", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            return await deed(page)

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_no_request_no_complaint_and_no_scrolling_sideways(reports: dict[str, Path]) -> None:
    async def deed(page: Page) -> None:
        for stage, path in reports.items():
            address = path.as_uri()
            for width in (NARROW, WIDE):
                await page.look(width)
                await page.open(address)
                found = await page.value("[document.documentElement.scrollWidth, document.title]")
                assert found[0] <= width, f"{stage} at {width} pixels"
                assert found[1] == "run: finished · gemma-tune", "no text of the data became a script"
            outside = await page.value(
                "[...document.querySelectorAll('main *, header *')].filter(one => !one.closest('svg, .scroll, nav'))"
                f".filter(one => one.getBoundingClientRect().right > {WIDE}).length"
            )
            assert outside == 0
        asked = [one["request"]["url"] for method, one in page.events if method == "Network.requestWillBeSent"]
        assert set(asked) == {path.as_uri() for path in reports.values()} | {"data:,"} & set(asked)
        complaints = [
            one
            for method, one in page.events
            if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        ]
        assert not complaints

    visit(deed)


def test_light_and_dark_follow_the_system_and_the_button(reports: dict[str, Path]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    readable = """(() => {
      const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((part) => {
        const share = part / 255;
        return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
      }).reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
      const back = light(getComputedStyle(document.body).backgroundColor);
      const contrast = (element) => {
        const front = light(getComputedStyle(element).color);
        return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
      };
      return Math.min(...[...document.querySelectorAll("p, td, th, dt, dd, h1, h2, h3, h4, em, summary, .read b")]
        .map(contrast));
    })()"""

    async def deed(page: Page) -> None:
        seen = {}
        for dark in (False, True):
            await page.look(WIDE, dark=dark)
            await page.open(reports["sft"].as_uri())
            seen[dark] = await page.value(background)
            assert await page.value(readable) >= 4.5, "WCAG 2.2 AA"
        assert seen[False] != seen[True]
        await page.value("document.querySelector('.theme').click()")  # auto -> light, in a dark system
        assert await page.value(background) == seen[False]
        await page.value("document.querySelector('.theme').click()")
        assert await page.value(background) == seen[True]
        await page.call("Emulation.setEmulatedMedia", media="print")
        assert await page.value(background) == "rgb(255, 255, 255)"

    visit(deed)


def test_charts_answer_to_keys_answers_to_words_and_the_plan_to_boxes(reports: dict[str, Path]) -> None:
    async def press(page: Page, key: str) -> str:
        for kind in ("keyDown", "keyUp"):
            await page.call("Input.dispatchKeyEvent", type=kind, key=key)
        return str(await page.value("document.activeElement.querySelector('.read').textContent"))

    async def deed(page: Page) -> None:
        await page.look(WIDE)
        await page.open(reports["sft"].as_uri())
        still = await page.value("(document.querySelector('figure').focus(), document.activeElement.innerText)")
        assert "training" in still and "held-out" in still
        assert "step 0: held-out 4" in await press(page, "Home"), "the base was evaluated before any step"
        assert "step 1: training" in await press(page, "ArrowRight")
        assert "step 60: training" in await press(page, "End")
        assert await page.value("document.querySelectorAll('figure .cursor').length") == 2, "one in either drawing"
        assert "step" not in await press(page, "Escape")
        box = await page.value(
            "(() => { const box = document.querySelector('figure svg').getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + 60]; })()"
        )
        await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        assert "step 32: training" in await page.value("document.querySelector('.read').textContent")
        visible = "[...document.querySelectorAll('.prompt')].filter(one => !one.hidden).length"
        assert await page.value(visible) == 9
        search = "(word => { const box = document.querySelector('#answers-word'); box.value = word;"
        await page.value(f"{search} box.dispatchEvent(new Event('input')); }})('7: ')")
        assert await page.value(visible) == 1
        defaults = "[...document.querySelectorAll('.plan tr.default')].filter(one => !one.hidden).length"
        assert await page.value(defaults) > 5
        await page.value("document.querySelector('[data-origin=default]').click()")
        assert await page.value(defaults) == 0

    visit(deed)


def test_without_javascript_nothing_is_missing(reports: dict[str, Path]) -> None:
    async def deed(page: Page) -> None:
        await page.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.look(WIDE)
        await page.call("Page.navigate", url=reports["ppo"].as_uri())
        await asyncio.sleep(0.5)
        tree = await page.call("Accessibility.getFullAXTree")
        names = {
            (node.get("role", {}).get("value"), node.get("name", {}).get("value"))
            for node in tree["nodes"]
            if not node.get("ignored")
        }
        assert {("heading", "Curves"), ("heading", "Answers"), ("heading", "Plan"), ("heading", "Evaluation")} <= names
        assert any(role in ("image", "img") and str(name).startswith("Reward, score") for role, name in names)
        assert not {name for role, name in names if role == "button"}, "what needs a script is not offered"

    visit(deed)
