"""Completions side by side as a page: every token with its probability, and no text becomes markup."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.inference.test_token_text import Pieces
from tests.tiny_export import char_tokenizer
from utils.inference.generator import Completion
from utils.inference.page import BOUNDS, LEGEND, completion_page, level, pieces
from utils.inference.side_by_side import RunCompletions

TOKENIZER = char_tokenizer("ab \n\t<>&\"'\x1b")
MARKUP = "<b>&\"'"
TOKEN = re.compile(r'<span class="t p(\d)( stop)?" title="([^"]*)">(.*?)</span>', re.DOTALL)


def completion(text: str, logprobs: list[float], prompt: str = "ab", tokens: str = "") -> Completion:
    ids = TOKENIZER.encode(tokens or text)
    return Completion(prompt, text, ids, logprobs, "stop" if tokens else "length", 7)


def page(*runs: RunCompletions) -> str:
    return completion_page(runs, "temperature 0.8")


def one(made: Completion, name: str = "baseline", val_loss: float | None = 1.5) -> str:
    return page(RunCompletions(name, val_loss, [made], TOKENIZER))


def luminance(color: str) -> float:
    """The relative luminance of #rrggbb [WCAG 2.1]."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("probability", "place"), [(1e-9, 0), (0.0099, 0), (0.03, 1), (0.1, 2), (0.3, 3), (0.6, 4), (0.95, 5), (1.0, 5)]
)
def test_each_range_of_probabilities_has_its_colour(probability: float, place: int) -> None:
    assert level(math.log(probability)) == place
    assert len(LEGEND) == len(BOUNDS) + 1


def test_each_token_has_a_colour_and_shows_its_probability() -> None:
    tokens = TOKEN.findall(one(completion("ba", [math.log(0.95), math.log(0.03)])))
    assert tokens == [
        ("5", "", "&#39;b&#39;  probability 95.00%, logprob -0.0513", "b"),
        ("1", "", "&#39;a&#39;  probability 3.00%, logprob -3.5066", "a"),
    ]


def test_white_space_is_visible_and_control_characters_are_escaped() -> None:
    assert pieces("ab  \n\t\x1bü") == [
        ("", "ab"),
        ("space", " "),
        ("space", " "),
        ("newline", "\n"),
        ("tab", "\t"),
        ("", r"\x1bü"),
    ]
    text = one(completion("\n \x1b", [-1.0] * 3))
    assert '<i class="newline">\n</i>' in text
    assert '<i class="space"> </i>' in text
    assert "\x1b" not in text


def test_text_of_a_run_is_never_markup() -> None:
    text = one(completion(MARKUP[:3], [-1.0] * 3, MARKUP), name=MARKUP)
    assert MARKUP not in text
    assert "<b>" not in text
    assert text.count("&lt;b&gt;&amp;&#34;&#39;") >= 4  # title, table, heading, prompt
    assert [shown for *_, shown in TOKEN.findall(text)] == ["&lt;", "b", "&gt;"]


def test_the_tokens_of_a_stop_string_are_struck_out() -> None:
    text = one(completion("a", [-1.0] * 3, tokens="ab\n"))
    assert [bool(stop) for _, stop, *_ in TOKEN.findall(text)] == [False, True, True]
    assert "the stop string" in text
    assert "the stop string" not in one(completion("a", [-1.0]))


@pytest.mark.parametrize(
    ("pieces", "text", "shown"),
    [
        ([b"Stra", b"\xc3", b"\x9f", b"e"], "Straße", ["Stra", "", "ß", "e"]),
        ([b"\xe6\x97\xa5\xe8", b"\xaa", b"\x9e", b"!"], "日語", ["日", "", "語", "stop !"]),
        ([b"a", b"\xc3", b"b", b"\xc3\xa9", b"EN", b"D"], "a�bé", ["a", "�", "b", "é", "stop EN", "stop D"]),
        ([b"a", b"\xc3", b"\x9f"], "a", ["a", "stop ", "stop ß"]),
        ([b"a", b"\xe6\x97"], "a�", ["a", "�"]),
    ],
)
def test_a_character_of_several_tokens_is_shown_at_the_token_that_completes_it(
    pieces: list[bytes], text: str, shown: list[str]
) -> None:
    made = Completion("ab", text, list(range(len(pieces))), [-1.0] * len(pieces), "stop", 7)
    tokenizer: Any = Pieces(pieces)
    found = TOKEN.findall(page(RunCompletions("baseline", 1.5, [made], tokenizer)))
    assert [f"{stop.strip()} {text}" if stop else text for _, stop, _, text in found] == shown


def test_the_tooltip_of_a_token_that_is_part_of_a_character_shows_its_bytes() -> None:
    tokenizer: Any = Pieces([b"\xc3", b"\x9f"])
    text = page(RunCompletions("baseline", 1.5, [Completion("", "ß", [0, 1], [-1.0, -1.0], "length", 7)], tokenizer))
    assert [tip.split()[0] for _, _, tip, _ in TOKEN.findall(text)] == [r"bytes:\xc3", r"bytes:\x9f"]


def test_runs_are_side_by_side_for_each_prompt_with_their_losses() -> None:
    runs = [
        RunCompletions(name, loss, [completion("a", [-1.0], "ab"), completion("b", [-3.0], "")], TOKENIZER)
        for name, loss in (("first", 1.25), ("second", None))
    ]
    text = page(*runs)
    assert text.count("<article>") == 4
    assert text.count('class="columns"') == 2
    assert "--runs: 2" in text
    assert text.count("val loss 1.2500") == 2
    assert '<td class="number">–</td>' in text
    assert '<td class="number">-2.0000</td>' in text  # the mean over both prompts
    assert f'<td class="number">{math.exp(2):.2f}</td>' in text
    assert "no prompt" in text
    assert "temperature 0.8, made" in text


def test_the_page_loads_nothing_else() -> None:
    text = one(completion("ab", [-1.0, -2.0]))
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|<[^>]*\bsrc=|@import|url\(", text)


def test_tokens_are_readable_on_every_colour_in_both_schemes() -> None:
    text = one(completion("a", [-1.0]))
    texts = re.findall(r"--text: (#\w{6})", text)
    schemes = re.findall(r"\{ --p0: .*?\}", text)
    assert len(texts) == len(schemes) == 2
    for color, scheme in zip(texts, schemes, strict=True):
        backgrounds = re.findall(r"--p\d: (#\w{6})", scheme)
        assert len(backgrounds) == len(LEGEND)
        assert min(contrast(color, background) for background in backgrounds) >= 5


@pytest.mark.xdist_group("browser")
def test_columns_scroll_on_a_phone_and_the_page_does_not(browser: Browser, tmp_path: Path) -> None:
    made = completion("a " * 60 + "b" * 200 + "\n", [-1.0] * 321)
    runs = [RunCompletions("a-long-name-of-a-run-" * 4, 1.5, [made], TOKENIZER) for _ in range(3)]
    (tmp_path / "page.html").write_text(page(*runs), encoding="utf-8")
    shown = browser.new_page(viewport={"width": 375, "height": 812})
    complaints: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.goto((tmp_path / "page.html").as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") == 375
    wide, seen = shown.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.querySelectorAll('.scroll')[1])")
    assert wide > 2 * seen
    assert shown.locator("pre").first.inner_text().endswith("b\n")  # copied text has no visible signs for white space
    assert complaints == []
