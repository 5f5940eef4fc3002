"""The pages of runs in headless Chromium, used with mouse and keyboard while a run trains.

Screenshots are kept in the folder named by WORKBENCH_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import PAGE_MS
from fake_runs import held_lock, log_lines, make_run
from playwright.sync_api import Browser, Page, Route, expect

from utils.pages.server import pages_app
from utils.runs.layout import METRICS_LOG

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

HOSTILE = "<img src=x onerror='document.title=1'>"
RATES = (1e-3, 3e-3)
BINS = {"min": -1.0, "max": 1.0, "counts": [1, 5, 9, 5], "nonfinite": 0}
HISTOGRAM = {"step": 0, "time": 1.0, "name": "params/head", **BINS}


def records(first: int, last: int, value: float) -> list[dict[str, Any]]:
    found = []
    for step in range(first, last):
        facts = {"step": step, "time": 1000.0 + step, "tokens": 64 * step, "train/loss": value + 2.0 / (step + 1)}
        found.append({**facts, **({"val/loss": facts["train/loss"] + 0.1} if step % 10 == 0 else {})})
    return [*found, {"step": last - 1, "time": 1000.0 + last, "system/process_memory": 900.0}]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates with three seeds each, a run in training, one with hostile texts, and a damaged one."""
    folder = tmp_path_factory.mktemp("pages")
    for i in range(6):
        value, settings = 1.0 + i / 100 + i // 3, {"learning_rate": RATES[i // 3], "seed": i % 3}
        histograms = [{**HISTOGRAM, "step": step} for step in (0, 50)]
        extra = {"samples": [{"step": 90, "time": 1.0, "text": "ROMEO: O!"}], "histograms": histograms}
        losses = {"val/loss": value, "best_val_loss": value}
        start = f"2026-01-31T14:2{i}:01.000+00:00"
        made = records(0, 100, value)
        make_run(folder, f"run{i}", settings=settings, metrics=made, summary=losses, start=start, **extra)
    live = {"status": "running", "end": None, "start": "2026-02-01T00:00:00+00:00", "histograms": [HISTOGRAM]}
    make_run(folder, "live", metrics=records(0, 20, 1.0), **live)
    make_run(folder, HOSTILE.replace("/", ""), tag=HOSTILE, notes={"note": HOSTILE * 50, "tags": [HOSTILE]})
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def url(runs_dir: Path) -> Iterator[str]:
    """Serve the pages in a thread, while the lock of the run `live` is held."""
    with socket.socket() as listener, held_lock(runs_dir / "live"):
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(pages_app(runs_dir, edit=True), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def page(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page; asserts afterwards that no script failed and nothing was requested from elsewhere."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, base_url=url)
    context.set_default_timeout(PAGE_MS)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if "400 (Bad" not in message.text else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.append(asked.url) if not asked.url.startswith((url, "data:")) else None)
    yield page
    assert problems == []
    context.close()


def visit(page: Page, path: str, name: str) -> None:
    """Open a page, wait until it is ready, and assert that nothing is wider than the screen."""
    page.goto(path)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    if folder := os.environ.get("WORKBENCH_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        width = page.viewport_size["width"] if page.viewport_size else 0
        page.screenshot(path=f"{folder}/pages_{name}_{width}.png", full_page=True, animations="disabled")


def drawn(page: Page, number: int = 0) -> bool:
    """Whether the chart has coloured points."""
    script = """canvas => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] > 200 && Math.abs(data[i] - data[i + 2]) > 60) return true;
        return false; }"""
    return bool(page.locator("canvas").nth(number).evaluate(script))


def ids(page: Page) -> list[str]:
    return page.locator("#table tbody th a").all_inner_texts()


def test_the_table_can_be_searched_filtered_sorted_and_grouped(page: Page, runs_dir: Path) -> None:
    visit(page, "/runs", "table")
    expect(page.locator("#count")).to_have_text("9 runs, 1 running")
    assert ids(page)[:2] == ["live", "run5"]
    assert HOSTILE in ids(page)  # as text, not as markup
    assert page.title() == "Runs"
    assert drawn(page)
    assert drawn(page, 1)

    page.keyboard.press("/")
    page.keyboard.type("learning_rate=0.003")
    expect(page.locator("#count")).to_have_text("3 of 9 runs, 1 running")
    page.locator("#search").fill("")
    page.locator("#where").fill("learning_rate > 0.002 and seed < 2")
    page.keyboard.press("Enter")
    expect(page.locator("#count")).to_have_text("2 of 9 runs, 1 running")
    page.locator("#where").fill("nonsense >")
    page.keyboard.press("Enter")
    expect(page.locator("#filter-problem")).to_contain_text("syntax error")
    page.locator("#where").fill("")
    page.keyboard.press("Enter")
    expect(page.locator("#filter-problem")).to_be_empty()

    page.get_by_role("button", name="best val").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#table tbody th a").first).to_have_text("run0")
    page.keyboard.press("Enter")  # the focus is on the redrawn button
    expect(page.locator("#table tbody th a").first).to_have_text("run5")
    page.get_by_label("Choose all that are shown").check()
    page.locator("#group").select_option("learning_rate")
    expect(page.locator("canvas").first).to_have_attribute("aria-label", re.compile("2 curves"))
    page.locator("canvas").first.focus()
    page.keyboard.press("End")
    expect(page.locator(".tip").first).to_contain_text("learning_rate=0.003 (3)")
    expect(page.locator("#panel .legend")).to_have_text("learning_rate=0.001 (5)learning_rate=0.003 (3)")
    page.locator("#group").select_option("")
    expect(page.locator("#panel .legend")).to_be_empty()


def test_tooltips_and_menus_fit_on_the_screen(page: Page) -> None:
    long_name = '"run5","' + "r" * 60
    page.route(
        "**/api/runs*", lambda route: route.fulfill(body=route.fetch().text().replace('"run5","run5', long_name))
    )
    visit(page, "/runs?run=run5&run=run1", "opened")
    fits = "box => { const { left, right } = box.getBoundingClientRect(); return left >= 0 && right <= innerWidth; }"
    box = page.locator("canvas").first.bounding_box()
    assert box
    for share in (0.3, 0.48, 0.56, 0.9):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
        expect(page.locator(".tip").first).to_have_text(re.compile(rf"^step \d+{'r' * 60}"))
        assert page.locator(".tip").first.evaluate(fits), share
    page.locator("#columns summary").click()
    assert page.locator("#column-list").evaluate(fits)
    expect(page.locator("#column-list")).to_contain_text("val_loss (best val)")


def test_a_curve_is_not_highlighted_after_its_row_is_gone(page: Page) -> None:
    visit(page, "/runs?run=run1&run=run5", "lit")
    image = "canvas => canvas.toDataURL()"
    canvas = page.locator("canvas").first
    before = canvas.evaluate(image)
    page.locator("#table tbody tr").filter(has_text="run1").locator("a").hover()
    assert canvas.evaluate(image) != before
    page.locator("#search").fill("nothing is called so")
    expect(page.locator("#table tbody tr")).to_have_count(0)
    page.wait_for_function("before => document.querySelector('canvas').toDataURL() === before", arg=before)


def test_a_group_has_the_same_colour_in_all_charts(page: Page) -> None:
    def answer(route: Route) -> None:
        has_first = "train" in route.request.url
        groups = [
            {"key": name, "name": name, "runs": ["run0"], "cursor": "0.2", "x": x, "y": x, "not_finite": 0}
            for name, x in (("a", [1, 2] if has_first else []), ("b", [1, 2]))
        ]
        route.fulfill(json={"metric": "x", "label": "x", "groups": groups})

    page.route("**/api/curves?*", answer)
    visit(page, "/runs?group=seed", "groups")
    expect(page.locator("#panel .legend")).to_have_text("a (1)b (1)")
    colours = set()
    for chart in (0, 1):
        page.locator("canvas").nth(chart).focus()
        page.keyboard.press("End")
        row = page.locator(".tip").nth(chart).locator(".tip-row", has_text="b (1)")
        colours.add(row.locator(".swatch").get_attribute("style"))
        page.keyboard.press("Escape")
    assert len(colours) == 1


def test_a_group_that_cannot_be_drawn_says_why(page: Page) -> None:
    facts = {"key": "seed=1", "name": "seed=1", "runs": ["run0", "run1"], "cursor": "0.0", "x": [], "y": []}
    answer = {"metric": "val/loss", "label": "val/loss", "groups": [{**facts, "not_finite": 0, "problem": "apart"}]}
    page.route("**/api/curves?*", lambda route: route.fulfill(json=answer))
    visit(page, "/runs?group=seed", "no_mean")
    expect(page.locator("canvas").first).to_have_attribute("aria-label", "val/loss: no group has a mean")
    expect(page.locator(".chart-note").first).to_have_text("seed=1: apart")


def test_a_loss_that_is_not_finite_leaves_its_column_one_of_numbers(page: Page) -> None:
    def answer(route: Route) -> None:
        table = route.fetch().json()
        for row in table["rows"]:
            row[5 + table["columns"].index("val_loss")] = "inf" if row is table["rows"][0] else 2.0
        route.fulfill(json=table)

    page.route("**/api/runs*", answer)
    visit(page, "/runs", "not_finite")
    assert page.locator("#table td.number", has_text="2.0000").count() == 8


@pytest.mark.parametrize(("lost", "says"), [(3, "no value of val/loss is finite"), (0, "val/loss is not logged")])
def test_a_chart_without_points_shows_the_reason(page: Page, lost: int, says: str) -> None:
    curve = {"run": "run0", "cursor": "0.0", "x": [], "y": [], "not_finite": lost}
    answer = {"metric": "val/loss", "label": "val/loss", "curves": [curve]}
    page.route("**/api/curves?*", lambda route: route.fulfill(json=answer))
    visit(page, "/runs?run=run0", "empty")
    expect(page.locator("canvas").first).to_have_attribute("aria-label", f"val/loss: {says}")


def test_curves_of_a_running_run_grow_by_deltas(page: Page, runs_dir: Path) -> None:
    steps = 20 if page.viewport_size and page.viewport_size["width"] > 500 else 30
    sizes: list[tuple[str, int]] = []
    page.on(
        "response", lambda answer: sizes.append((answer.url, len(answer.body()))) if "/api/" in answer.url else None
    )
    visit(page, "/runs?run=live&run=run1", "live")
    whole = max(size for address, size in sizes if "/api/curves" in address)
    sizes.clear()
    with (runs_dir / "live" / METRICS_LOG).open("a") as log:
        log.write(log_lines(records(steps, steps + 10, 1.0)))
    row = page.locator("#table tbody tr").filter(has_text="live")
    with page.expect_response(lambda answer: "/api/curves" in answer.url and "known=" in answer.url):
        expect(row).to_contain_text(str(steps + 9))
    curves = [size for address, size in sizes if "/api/curves" in address]
    assert curves
    assert max(curves) < whole / 3
    assert max(size for address, size in sizes if "/api/runs" in address) < 1000


def test_the_page_of_a_run_shows_charts_samples_histograms_settings_and_files(page: Page) -> None:
    visit(page, "/runs/run?run=run5", "run")
    expect(page.locator("h1")).to_have_text("run5")
    assert all(drawn(page, i) for i in range(3))
    expect(page.locator("#system canvas")).to_have_count(1)
    expect(page.locator("#samples")).to_contain_text("ROMEO: O!")
    expect(page.locator("#heat")).to_have_attribute(
        "aria-label", "Histograms of params/head at 2 steps. Arrow keys read them."
    )
    assert drawn(page, 3)
    expect(page.locator("#setting-table tbody tr")).to_have_count(2)
    page.locator("#setting-search").fill("batch_size")
    expect(page.locator("#setting-table tbody tr").first).to_contain_text("batch_size")
    page.locator("#files summary").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="run.json").click()
    assert download.value.suggested_filename == "run.json"


def test_the_histogram_of_a_single_step_is_a_column(page: Page) -> None:
    visit(page, "/runs/run?run=live", "one_step")
    end = """canvas => {
        const row = canvas.height / 2, { data } = canvas.getContext('2d').getImageData(0, row, canvas.width, 1);
        let last = 0;
        for (let x = 0; x < canvas.width; x += 1) if (data[4 * x + 3]) last = x;
        return last / canvas.width; }"""
    assert 0 < page.locator("#heat").evaluate(end) < 0.5


def test_a_comparison_has_a_verdict_and_differences(page: Page) -> None:
    visit(page, "/runs/compare?" + "&".join(f"run=run{i}" for i in range(6)), "compare")
    expect(page.locator("#verdict-list")).to_contain_text("better by")
    expect(page.locator("#diff")).to_contain_text("learning_rate")
    assert drawn(page)


def test_a_comparison_of_long_names_keeps_its_numbers_visible(page: Page) -> None:
    name = "lr3e-3_wd0.1_layers12_heads12_embd768_dropout0.05_seed1337"

    def renamed(route: Route) -> None:
        answer = route.fetch().json()
        comparison = json.loads(json.dumps(answer["comparison"]).replace("run0", name))
        route.fulfill(json={**answer, "comparison": comparison})

    page.route("**/api/compare?*", renamed)
    visit(page, "/runs/compare?" + "&".join(f"run=run{i}" for i in range(6)), "long_names")
    expect(page.locator("#verdict-list")).to_contain_text(f"{name} against run3")
    for last in (page.locator("#verdict-list tr td").last, page.locator("#at tr td").last):
        right = "(element) => element.getBoundingClientRect().right"
        assert last.evaluate(right) <= last.locator("xpath=ancestor::div[@class='scroll']").evaluate(right) + 1


def test_notes_are_edited_in_a_dialog_and_never_become_markup(page: Page) -> None:
    visit(page, "/runs", "before")
    page.get_by_role("button", name=f"Edit {HOSTILE}").click()
    page.locator("dialog textarea").fill(f"new {HOSTILE}")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("dialog")).to_have_count(0)
    row = page.locator("#table tbody tr").filter(has_text=f"new {HOSTILE}")
    expect(row).to_have_count(1)
    row.locator("th a").click()
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#results")).to_contain_text(f"new {HOSTILE}")
    assert page.locator("main img").count() == 0


def test_the_page_of_an_unknown_run_shows_one_message(browser: Browser, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}/runs/run?run=nope")
    expect(page.locator("#problems")).to_have_text("there is no run 'nope'")
    page.close()
