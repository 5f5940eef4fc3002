"""Cleaning: what each step changes, its exact bounds, linear time, and pipelines described by files."""

from __future__ import annotations

import pickle
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from utils.config.parse import ConfigError
from utils.corpora import filters, language
from utils.corpora.cleaning import Cleaned, CleaningReport, Pipeline, load_pipeline
from utils.corpora.filters import paragraph_length_filter, paragraph_repetition_filter
from utils.corpora.language import language_filter
from utils.corpora.long_cleaning import LongCleaning
from utils.corpora.steps import COMPARING, STEPS, Step, example_text
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = load_pipeline(ROOT / "configs" / "cleaning.yaml")
NO_NGRAMS = {"top_2gram": 1, "top_3gram": 1, "top_4gram": 1}
ALONE = [kind() for kind in STEPS.values() if kind not in COMPARING]
STORY = (
    "Once upon a time there was a little girl who lived in a village near the forest. Whenever she went out, the girl "
    "wore a red riding cloak, so everyone in the village called her Little Red Riding Hood.\n"
)
NETRC = "machine x login y password pass1234-----BEGIN RSA PRIVATE KEY-----x"  # two secrets side by side
TEXTS = {
    "empty": "",
    "one character": "x",
    "blank": " \n\t\n ",
    "story": STORY,
    "chinese": "很久很久以前,在一座森林旁边的村庄里住着一个小女孩。她每次出门都穿着一件红色的斗篷。",
    "repeated": "Buy now!\n" * 20,
    "web page": f"Skip to content\n{STORY}\nWe and our partners uses cookies\nAll rights reserved",
    "address": f"{STORY} Write to grandmother@forest.example.org, or mother+child@village.org.",
    "secrets": f"{STORY} password = 'hunter2Xyz99', token ghp_{'a1B2c3D4e5' * 4}\n{NETRC}",
    "controls": "\x1b[31mred\x1b[0m \x1b\x1b[31m[32m zero\u200bwidth \ud800 half\r\nline\rline\fpage \ufeff\u202eevil",
    "combining": "e\u0301 \u1e9b\u0323 A\u030a \ufb01 \uff21 " + "\u0344" * 100,
}


def step(name: str, **thresholds: Any) -> Step:
    return STEPS[name](**thresholds)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_step_is_pure_and_idempotent(text: str) -> None:
    for each in [*ALONE, step("unicode_normalization", form="NFKD")]:
        once = each.apply(text)
        assert each.apply(text) == once
        if once.text is not None:
            assert each.apply(once.text) == (once.text, 0, ""), each.name
        assert (once.changes == 0) == (once.text == text), each.name
        assert bool(once.example) == bool(once.changes), each.name


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_shipped_pipeline_is_idempotent(text: str) -> None:
    once = SHIPPED.apply(text)
    assert SHIPPED.apply(text) == once
    if once.text is not None:
        assert SHIPPED.apply(once.text) == Cleaned(once.text)


PIECES = (
    "",
    " ",
    "x",
    "a line of a page",
    "me@example.org",
    "all rights reserved",
    "e\u0301",
    "\u200b",
    "  two words ",
)


@pytest.mark.parametrize("seed", range(40))
def test_a_document_in_pieces_is_cleaned_like_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["".join(rng.choice(PIECES) + "\n" for _ in range(rng.randrange(6))) for _ in range(rng.randrange(1, 5))]
    pieces[-1] = pieces[-1].rstrip("\n")
    names = ("control_characters", "unicode_normalization", "boilerplate_lines", "emails", "secrets")
    least, most = sorted(rng.randrange(120) for _ in range(2))
    lengths = step("document_length", min_characters=least, max_characters=most)
    paragraphs = step("paragraph_length", min_paragraphs=rng.randrange(8), min_characters=rng.randrange(12))
    steps = [*map(step, names), lengths, paragraphs, step("repetition"), step("language", min_probability=0.1)]
    rng.shuffle(steps)
    expected = Pipeline(steps).apply("".join(pieces))
    cleaning = LongCleaning(Pipeline(steps))
    text = "".join(map(cleaning.add, pieces))
    cleaned = cleaning.finish()
    assert (cleaned.removed_by, cleaned.counts) == (expected.removed_by, expected.counts)
    if expected.text is not None:
        assert text == expected.text
        assert cleaned.text == ""


@pytest.mark.parametrize("good", [True, False])
def test_a_line_may_continue_in_the_next_piece(good: bool) -> None:
    for kind, name, least in (("document_length", "min_characters", 7), ("paragraph_length", "min_characters", 7)):
        thresholds = {name: least + (not good)} | ({"min_paragraphs": 1} if kind == "paragraph_length" else {})
        cleaning = LongCleaning(Pipeline([step(kind, **thresholds)]))
        for piece in ("  a", "  ", " ", "b c  ", "\n", " "):
            cleaning.add(piece)
        assert (cleaning.finish().removed_by is None) == good


def test_the_shipped_pipeline_keeps_english_prose_only() -> None:
    assert [each.name for each in SHIPPED.steps] == [
        *("control_characters", "unicode_normalization", "boilerplate_lines", "emails", "secrets", "document_length"),
        *("paragraph_length", "repetition", "language", "exact_duplicates", "near_duplicates"),
    ]
    assert SHIPPED.exact_duplicates
    assert SHIPPED.near_duplicates == 0.8
    assert pickle.loads(pickle.dumps(SHIPPED)) == SHIPPED
    assert {name: SHIPPED.apply(text).removed_by for name, text in TEXTS.items()} == {
        **dict.fromkeys(("empty", "one character", "blank", "controls", "combining"), "document_length"),
        **{"chinese": "document_length", "repeated": "paragraph_length"},
        **dict.fromkeys(("story", "web page", "address", "secrets")),
    }
    german = "Es war einmal eine kleine süße Dirne, die hatte jedermann lieb, der sie nur ansah, am allerliebsten aber "
    assert SHIPPED.apply(TEXTS["chinese"] * 3).removed_by == "language"
    assert (
        SHIPPED.apply(f"{german} ihre Großmutter, die wusste gar nicht, was sie geben sollte.").removed_by == "language"
    )


# ------------------------------------------------------------------------------------------------ steps and bounds


@pytest.mark.parametrize(
    ("name", "text", "expected", "changes"),
    [
        ("emails", TEXTS["address"], f"{STORY} Write to <EMAIL>, or <EMAIL>.", 2),
        ("emails", "请写信到test@example.com谢谢", "请写信到<EMAIL>谢谢", 1),
        ("emails", "@property a@b a@b.c @x.org x@y.example-", "@property a@b a@b.c @x.org x@y.example-", 0),
        ("secrets", "password = 'hunter2Xyz99' is it", "password = '<SECRET>' is it", 1),
        ("secrets", f"ghp_{'a1B2c3D4e5' * 4}, AKIA{'ABCDEFGH' * 2}", "<SECRET>, <SECRET>", 2),
        ("secrets", "https://me:pa55word@example.org/", "https://me:<SECRET>@example.org/", 1),
        ("control_characters", TEXTS["controls"], "red [32m zerowidth  half\nline\nline\npage evil", 11),
        ("control_characters", "tab\tstays, 👩\u200d👩 too", "tab\tstays, 👩\u200d👩 too", 0),
        ("unicode_normalization", "e\u0301 \ufb01", "é \ufb01", 1),
        ("boilerplate_lines", TEXTS["web page"], f"{STORY}", 3),
        ("boilerplate_lines", f"a {'long ' * 50} line: all rights reserved", None, 0),
    ],
)
def test_each_step_changes_what_it_should(name: str, text: str, expected: str | None, changes: int) -> None:
    result = step(name).apply(text)
    assert (result.text, result.changes) == (text if expected is None else expected, changes)


def test_forms_masks_and_phrases_can_be_set() -> None:
    assert step("unicode_normalization", form="NFKC").apply("\ufb01ne \uff21").text == "fine A"
    assert step("emails", mask="<ADDRESS>").apply("a@b.org").text == "<ADDRESS>"
    assert step("boilerplate_lines", phrases=("Read More",)).apply("text\nread more...\n").text == "text\n"


@pytest.mark.parametrize(
    ("name", "thresholds", "kept", "removed"),
    [
        ("document_length", {"min_characters": 5}, " 12345 ", " 1234 "),
        ("document_length", {"min_characters": 0, "max_characters": 5}, "12345\n", "123456"),
        ("paragraph_length", {"min_paragraphs": 2, "min_characters": 3}, "abc\nab\n\n abc", "abc\nab\n\n ab "),
        ("repetition", NO_NGRAMS, "a\na\na\na\nb\nc\nd\ne\nf\ng", "a\na\na\na\na\nb\nc\nd\ne\nf"),  # 3, 4 of 10
        ("repetition", NO_NGRAMS, "a\n\na\n\na\n\na\n\nb\n\nc\n\nd\n\ne\n\nf\n\ng", "a\n\nb\n\na\n\nb"),
        ("repetition", {"top_2gram": 0.5}, "aa bb cc dd aa bb ee ff", "aa bb cc dd aa bb ee f"),  # 8 of 16 and 15
        ("repetition", {"top_2gram": 1, "top_3gram": 0.5}, "a b c d e f a b c g h i", "a b c d e f a b c g h"),
        ("repetition", NO_NGRAMS | {"top_4gram": 0.5}, "a b c d 1 2 3 4 a b c d 5 6 7 8", "a b c d " * 2),
    ],
)  # fmt: skip
def test_texts_at_a_threshold_are_kept_and_those_beyond_it_removed(
    name: str, thresholds: dict[str, Any], kept: str, removed: str
) -> None:
    assert step(name, **thresholds).apply(kept).text == kept
    assert step(name, **thresholds).apply(removed).text is None


def test_gophers_thresholds_are_the_defaults() -> None:
    repetition = step("repetition").model_dump()
    assert list(repetition.values()) == [0.30, 0.30, 0.20, 0.18, 0.16]
    words = " ".join(f"word{number}" for number in range(100))
    assert paragraph_repetition_filter(f"{words} ")
    for size, share in filters.TOP_NGRAMS.items():
        count = int(share * 100 / size) + 1
        spread = words
        for number in range(count):
            spread = spread.replace(f"word{number * 3} ", f"word{number * 3} {' '.join('abcde'[:size])}{number:03} ", 1)
        assert paragraph_repetition_filter(spread), "each n-gram occurs once"


def reference_share(text: str, n: int) -> float:
    """The share of the most frequent n-gram, counted without short cuts."""
    words = filters.words_of(text)
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    most = max(map(grams.count, grams), default=0)
    best = max((sum(map(len, gram)) for gram in grams if grams.count(gram) == most), default=0)
    return most * best / sum(map(len, words)) if most > 1 else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_the_ngram_filter_equals_a_count_without_short_cuts(seed: int) -> None:
    generator = random.Random(seed)
    text = " ".join(generator.choices(["a", "of", "the", "model", "weights", "中文"], k=generator.randint(1, 40)))
    for n in (2, 3, 4):
        share = reference_share(text, n)
        for bound in (share, share - 1e-9, 0.2):
            assert paragraph_repetition_filter(text, top_ngrams={n: bound}) == (share <= bound)


def test_a_chinese_text_without_spaces_can_repeat_itself() -> None:
    assert paragraph_repetition_filter(TEXTS["chinese"])
    assert not paragraph_repetition_filter("买一送一" * 10)


def test_languages_are_recognized() -> None:
    assert step("language").apply(STORY).text == STORY
    removed = step("language", languages=("de",)).apply(STORY)
    assert (removed.text, removed.example[:9]) == (None, "en (1.00)")
    assert step("language", languages=("zh",)).apply(TEXTS["chinese"]).text
    assert step("language", languages=("en", "zh"), min_probability=1.0).apply("Hello").text is None
    assert language_filter(STORY, ["de", "en"])
    assert not language_filter("", "en"), "an empty text has no language"
    with pytest.raises(UserError, match="unknown language eng; did you mean en"):
        language_filter(STORY, "eng")


def test_filter_functions_accept_records_of_a_dataset() -> None:
    assert paragraph_length_filter({"text": "One.\nTwo.\nThree."})
    assert not paragraph_repetition_filter({"text": TEXTS["repeated"], "id": 1})
    assert language_filter({"text": STORY})


LONG_LINES = {
    "letters": lambda n: "a" * n,
    "words": lambda n: "ab " * (n // 3),
    "digits and dots": lambda n: "1." * (n // 2),
    "at signs": lambda n: "a@" * (n // 2),
    "addresses": lambda n: "a.b@c." * (n // 6),
    "keys": lambda n: "key=" * (n // 4),
    "chinese": lambda n: "买一" * (n // 2),
    "marks": lambda n: "a" + "\u0301\u0323" * (n // 2),
    "escapes": lambda n: "\x1b[" * (n // 2),
    "spaces": lambda n: "\n" + " " * n + "x",
    "breaks": lambda n: "\n \n" * (n // 3),
}


@pytest.mark.parametrize("line", LONG_LINES.values(), ids=LONG_LINES)
def test_a_long_line_takes_linear_time(line: Any) -> None:
    """Quadratic time would be minutes for these lines of 100 kB."""
    text = line(100_000)
    start = time.process_time()
    for each in ALONE:
        each.apply(text)
    assert time.process_time() - start < 5


# ------------------------------------------------------------------------------------------------ pipelines and reports


def pipeline(tmp_path: Path, text: str, name: str = "cleaning.yaml") -> Pipeline:
    path = tmp_path / name
    path.write_text(text)
    return load_pipeline(path, name)


def test_steps_run_in_the_order_of_the_file(tmp_path: Path) -> None:
    masked_first = pipeline(tmp_path, "- emails\n- document_length:\n    min_characters: 8\n")
    assert masked_first.apply("a@b.org").removed_by == "document_length"
    assert masked_first.apply("abc@def.org").removed_by == "document_length"  # <EMAIL> has 7 characters
    cut_first = pipeline(tmp_path, "- document_length: {min_characters: 8}\n- emails:\n")
    assert cut_first.apply("abc@def.org") == Cleaned("<EMAIL>", None, {"emails": 1}, {"emails": "<EMAIL>"})
    assert (cut_first.exact_duplicates, cut_first.near_duplicates) == (False, None)


def test_a_document_that_a_step_leaves_blank_is_removed(tmp_path: Path) -> None:
    cleaned = pipeline(tmp_path, "- boilerplate_lines\n").apply("All rights reserved\n")
    assert (cleaned.text, cleaned.removed_by) == (None, "boilerplate_lines")


def test_a_pipeline_can_be_written_in_json(tmp_path: Path) -> None:
    made = pipeline(tmp_path, '[{"near_duplicates": {"threshold": 0.9}}]', "steps.json")
    assert (made.exact_duplicates, made.near_duplicates) == (True, 0.9)
    assert made.to_json() == [{"step": "near_duplicates", "settings": {"threshold": 0.9}}]


def test_norwegian_is_not_read_as_false(tmp_path: Path) -> None:
    found = pipeline(tmp_path, "- language:\n    languages: [no, nn]\n")
    assert found.to_json()[0]["settings"]["languages"] == ["no", "nn"]


MISTAKES = {
    "- emails\n- repetiton\n": "cleaning.yaml:2: unknown step repetiton; did you mean repetition?",
    "- emails\n- language:\n    language: [en]\n": (
        "cleaning.yaml:3: unknown threshold language of language; did you mean languages?"
    ),
    "- language:\n    languages: [english]\n": "cleaning.yaml:2: language.languages: unknown language english",
    "- language:\n    languages: en\n": (
        "cleaning.yaml:2: language.languages: expected a list of codes such as [en, de], got 'en'"
    ),
    "- repetition:\n    top_2gram: 20\n": (
        "cleaning.yaml:2: repetition.top_2gram: expected a number from 0 to 1, got 20"
    ),
    "- near_duplicates:\n    threshold: 0.5\n": (
        "cleaning.yaml:2: near_duplicates.threshold: expected a number from 0.7 to 1, got 0.5"
    ),
    "- document_length:\n    min_characters: yes\n": "min_characters: expected an integer >= 0, got True",
    "- document_length:\n    min_characters: 9\n    max_characters: 5\n": (
        "cleaning.yaml:3: document_length.max_characters: 5 is below min_characters (9)"
    ),
    "- emails:\n    mask: me@x.org\n": "expected a name in angle brackets, such as <EMAIL>, got 'me@x.org'",
    "- emails\n\n- emails\n": "cleaning.yaml:3: emails is listed twice (first in line 1)",
    "- exact_duplicates\n- emails\n": (
        "cleaning.yaml:2: emails comes after exact_duplicates: steps that compare documents must come last"
    ),
    "- exact_duplicates: 3\n": "cleaning.yaml:1: exact_duplicates: expected its thresholds by name, got 3",
    "- exact_duplicates:\n    threshold: 1\n": (
        "cleaning.yaml:2: unknown threshold threshold of exact_duplicates, which has no thresholds"
    ),
    "- [emails]\n": "cleaning.yaml:1: expected the name of a step, or a name with its thresholds",
    "emails:\n": "cleaning.yaml:1: expected a list of steps (unicode_normalization, ",
    "": "cleaning.yaml:1: expected a list of steps",
    "- emails: {mask: 1\n": "cleaning.yaml:2: not valid YAML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_reported_in_one_line_with_its_place(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline(tmp_path, text)
    assert MISTAKES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"cleaning.yaml:2: near_duplicates needs the package rensa: pip install"):
        pipeline(tmp_path, "- exact_duplicates\n- near_duplicates\n")
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match="pip install py3langid"):
        language._identifier.__wrapped__()


def test_a_report_counts_and_shows_the_first_three() -> None:
    report = CleaningReport(SHIPPED)
    assert (
        "- boilerplate_lines (14 phrases, max_characters 200): nothing found" in report.lines()
    )  # without listing them
    texts = [TEXTS["address"], *(f"short {number}" for number in range(5)), TEXTS["web page"], STORY, STORY]
    for text in texts:
        report.add(SHIPPED.apply(text))
    report.add_removed("exact_duplicates", f"{STORY} me@example.org")
    found = {entry["step"]: entry for entry in report.to_json()}
    assert (report.documents, report.kept) == (9, 3)
    assert found["document_length"] == {
        "step": "document_length",
        "settings": {"min_characters": 100, "max_characters": None},
        "documents_removed": 5,
        "documents_changed": 0,
        "count": 5,
        "unit": "document",
        "examples": ["7 characters: short 0", "7 characters: short 1", "7 characters: short 2"],
    }
    assert [found["emails"][key] for key in ("count", "unit", "documents_changed")] == [2, "replacement", 1]
    assert found["exact_duplicates"]["documents_removed"] == 1
    assert "me@example.org" not in str(report.to_json())
    lines = report.lines()
    assert "- document_length (min_characters 100, max_characters none): 5 documents removed" in lines
    assert "- boilerplate_lines" in " ".join(lines)
    assert "3 lines in 1 document" in " ".join(lines)
    assert "- near_duplicates (threshold 0.8): nothing found" in lines


def test_examples_show_neither_addresses_nor_secrets() -> None:
    text = f"me@example.org password = 'hunter2Xyz99' {'ghp_' + 'a1B2c3D4e5' * 4}"
    removed = SHIPPED.apply(text[:99])
    shown = str(removed)
    assert removed.removed_by == "document_length"
    assert not any(secret in shown for secret in ("me@example", "hunter2", "a1B2c3"))


KEY_LINES = [chr(97 + number) * 3 + "K9x" * 20 + "7" for number in range(40)]
ENCRYPTED = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,0F\n\n"
BEGIN, END = "-----BEGIN RSA PRIVATE KEY-----\n", "\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize("header", ["", ENCRYPTED])
def test_a_private_key_is_masked_to_its_end(header: str) -> None:
    text = f"a {BEGIN}{header}{chr(10).join(KEY_LINES * 3)}{END} z"
    assert STEPS["secrets"]().apply(text).text == "a <SECRET> z"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("document_length", BEGIN + "\n".join(KEY_LINES)),  # the example is cut within the key
        ("document_length", "key: " + BEGIN.replace("\n", r"\n") + r"\n".join(KEY_LINES)),
        ("control_characters", f"{BEGIN}{chr(10).join(KEY_LINES[:9])}\0{chr(10).join(KEY_LINES[9:])}{END}"),
        ("control_characters", f"{BEGIN}{chr(10).join(KEY_LINES)}{END}\0"),
        ("unicode_normalization", f"{BEGIN}{chr(10).join(KEY_LINES[:9])}e\u0301{chr(10).join(KEY_LINES[9:])}{END}"),
        ("unicode_normalization", "e\u0301 ghp_" + "aK9x" * 9),
        ("emails", f"{BEGIN}{chr(10).join(KEY_LINES)}{END} me@example.org"),
        ("repetition", "sk-proj-" + "aK9x" * 12 + "\n\n" + "AKIAK7XAK7XAK7XAK7XA " * 9),
    ],
)
def test_an_example_shows_no_part_of_a_secret(name: str, text: str) -> None:
    step = STEPS[name](max_characters=200) if name == "document_length" else STEPS[name]()
    result = step.apply(text)
    assert result.changes
    assert not re.search("k[79]x", example_text(result.example).lower())
