"""The page at / in headless Chromium, on a desktop and on a phone.

Screenshots are saved below the test's tmp_path, or in the folder named by WORKBENCH_SCREENSHOTS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PAGE_MS
from playwright.sync_api import Browser, Page, expect

from utils.inference.generator import Generator, Request
from utils.inference.sampling import SamplingOptions

pytestmark = pytest.mark.xdist_group("serving")

TEXT = "#outputs pre"


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page in a new context. The test fails if it contacts another server or logs an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PAGE_MS)
    asked: list[str] = []
    problems: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert [address for address in asked if not address.startswith((url, "data:", "about:"))] == []
    assert problems == []


def save_screenshot(page: Page, folder: Path, name: str) -> None:
    pictures = Path(os.environ.get("WORKBENCH_SCREENSHOTS", folder))
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=pictures / f"{name}.png", animations="disabled", full_page=True)


def text_of(generator: Generator, prompt: str, count: int, temperature: float, seed: int) -> str:
    return generator.generate(prompt, Request(count, SamplingOptions(temperature=temperature), seed=seed)).text


@pytest.fixture(scope="module")
def alone(runs_dir: Path) -> list[Generator]:
    return [Generator.from_run(str(path), device="cpu") for path in sorted(runs_dir.iterdir())]


def test_a_text_is_generated_by_keyboard_and_reproduced_by_its_link(
    page: Page, url: str, alone: list[Generator], tmp_path: Path
) -> None:
    page.goto(url)
    expect(page.get_by_label("first")).to_be_checked()
    page.get_by_label("Prompt").fill("the quick ")
    page.get_by_label("Tokens", exact=True).fill("80")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Seed", exact=True).press("Enter")
    expected = text_of(alone[0], "the quick ", 80, 0.8, 7)
    expect(page.locator("#history button")).to_have_count(1)
    expect(page.locator(".status")).to_contain_text("80 tokens, ")
    assert page.locator(TEXT).text_content() == "the quick " + expected

    page.locator(TEXT).locator(".t").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip tr").nth(4)).to_be_visible()
    chances = [float(text.rstrip("%")) for text in page.locator("#tip td:last-child").all_inner_texts()]
    assert chances == sorted(chances, reverse=True)
    save_screenshot(page, tmp_path, "playground")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()

    link = page.url
    assert {"run=first", "seed=7", "max_tokens=80"} <= set(link.split("#")[1].split("&"))
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator(".status")).to_contain_text("80 tokens, ")
    assert page.locator(TEXT).text_content() == "the quick " + expected
    page.get_by_label("Seed", exact=True).fill("8")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#history button")).to_have_count(2)
    assert page.locator(TEXT).text_content() == "the quick " + text_of(alone[0], "the quick ", 80, 0.8, 8)
    page.locator("#history button").last.click()
    expect(page.locator("#history button").first).to_contain_text("seed 7")
    assert page.locator(TEXT).text_content() == "the quick " + expected


def test_runs_are_side_by_side_on_a_desktop_and_below_each_other_on_a_phone(
    page: Page, url: str, alone: list[Generator], tmp_path: Path
) -> None:
    page.goto(f"{url}/#run=first&run=second&prompt=a&max_tokens=60&temperature=1&repetition_penalty=1&seed=3")
    expect(page.locator(".status").filter(has_text="60 tokens, ")).to_have_count(2)
    assert page.locator(TEXT).all_text_contents() == ["a" + text_of(run, "a", 60, 1, 3) for run in alone]
    first, second = (section.bounding_box() for section in page.locator("#outputs section").all())
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(TEXT).last.locator(".t").nth(20).click()
    expect(page.locator("#tip")).to_be_visible()
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    save_screenshot(page, tmp_path, "playground_phone")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    save_screenshot(page, tmp_path, "playground_dark")


def test_a_link_clears_the_fields_that_it_leaves_out(page: Page, url: str) -> None:
    page.goto(f"{url}/#prompt=a&top_p=0.9&top_k=3&min_p=0.1&repetition_penalty=1.5&stop=z&seed=3")
    names = ["top_p", "top_k", "min_p", "repetition_penalty", "stop"]
    fields = [page.locator(f"#{name}") for name in names]
    for field in fields:
        expect(field).not_to_have_value("")
    page.goto(f"{url}/#prompt=b&seed=3")
    expect(page.get_by_label("Prompt")).to_have_value("b")
    for field in fields:
        expect(field).to_have_value("")


def test_a_long_text_can_be_stopped_and_a_link_cannot_inject_markup(page: Page, url: str) -> None:
    page.goto(f"{url}/#run=first&prompt=a&max_tokens=50000&temperature=1&repetition_penalty=1&seed=3")
    expect(page.locator(".status")).to_contain_text("tokens, ")
    page.keyboard.press("Escape")
    expect(page.locator(".status")).to_contain_text("tokens, stopped")
    page.goto(f"{url}/#run=nobody&prompt=%3Cimg%20src=x%20onerror=alert(1)%3E&seed=%3Cb%3E")
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("This server does not have nobody.")
    expect(page.locator("main img, main b")).to_have_count(0)
    page.get_by_role("link", name="All runs").click()
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("heading", name="Playground")).to_be_visible()


# Passes tokens to an Output like the events of a stream; returns the text that it shows, and the part struck through.
OUTPUT = """([tokens, text, finish]) => {
  const output = new Output({ id: "run", val_loss: null });
  const take = (token, text, finish_reason) =>
    output.take({ text, finish_reason, logprobs: { tokens: token, token_logprobs: [-1], top_logprobs: [{}] } });
  tokens.forEach((token) => take([token], "", null));
  take([], text, finish);
  const cut = [...output.pre.querySelectorAll(".cut")].map((span) => span.textContent);
  return [output.pre.textContent, cut.join("")];
}"""


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([r"bytes:\x53\x74\x72\x61\xc3", r"bytes:\x9f", "e ", "gut"], "Straße gut"),
        ([r"bytes:\xe6\x97\xa5\xe6\x9c\xac\xe8", r"bytes:\xaa", r"bytes:\x9e", "!"], "日本語!"),
        ([r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98\x80\xf0\x9f", r"bytes:\x98\x80"], "😀😀"),
        ([r"bytes:\xc3", "a", r"bytes:\xc3", r"bytes:\xa9"], "�aé"),
        (["a", r"bytes:\xe6\x97"], "a�"),
        (["\ufeff", "a"], "\ufeffa"),
    ],
)
def test_characters_of_several_tokens_are_shown_whole(page: Page, url: str, tokens: list[str], text: str) -> None:
    page.goto(url)
    assert page.evaluate(OUTPUT, [tokens, text, "length"]) == [text, ""]


def test_a_stop_string_after_an_invalid_byte_is_struck_through(page: Page, url: str) -> None:
    page.goto(url)
    tokens = ["a", r"bytes:\xc3", "b", r"bytes:\xc3", r"bytes:\xa9", "E", "N", "D"]
    assert page.evaluate(OUTPUT, [tokens, "a�bé", "stop"]) == ["a�béEND", "END"]
    assert page.evaluate(OUTPUT, [["a", r"bytes:\xc3", "END"], "a�", "stop"]) == ["a�END", "END"]
