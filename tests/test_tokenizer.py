"""The character tokenizer: round trips, files, and the errors of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenizer import CharTokenizer, TokenizerError
from utils.errors import UserError

TEXTS = ["a", "hello world\n", "tab\tnul\x00\r\n", "übergrößenträger", "кириллица и 漢字", "astral 😀 and 𝔊𝔬𝔱𝔥𝔦𝔠 🏴"]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_places_in_code_point_order() -> None:
    tokenizer = CharTokenizer.from_text("cab😀a\n")
    assert tokenizer.vocabulary == ["\n", "a", "b", "c", "😀"]
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("abc😀\n") == [1, 2, 3, 4, 0]


def test_an_astral_character_is_one_token() -> None:
    assert len(CharTokenizer.from_text("😀😀x").encode("😀x😀")) == 3


def test_encode_array_holds_the_ids_of_encode() -> None:
    tokenizer = CharTokenizer.from_text("hello wörld")
    ids = tokenizer.encode_array("hello")
    assert (ids.shape, ids.dtype) == ((5,), np.dtype(np.int64))
    assert ids.tolist() == tokenizer.encode("hello")


def test_an_empty_text_has_no_tokens() -> None:
    tokenizer = CharTokenizer.from_text("ab")
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "character", "code_point", "position"),
    [
        ("abX", "'X'", "U+0058", 2),
        ("a\tb", r"'\\t'", "U+0009", 1),
        ("b😀😀", "'😀'", r"U\+1F600", 1),  # beyond the largest code point of the vocabulary
        ("😁", "'😁'", r"U\+1F601", 0),
    ],
)
def test_unknown_character_is_named_with_its_position(
    text: str, character: str, code_point: str, position: int
) -> None:
    pattern = rf"character {character} \({code_point.replace('U+', 'U[+]')}\) at position {position} "
    with pytest.raises(TokenizerError, match=pattern):
        CharTokenizer.from_text("ab").encode(text)


def test_unknown_position_counts_characters_not_bytes() -> None:
    with pytest.raises(TokenizerError, match="position 3 "):
        CharTokenizer.from_text("😀ü").encode("😀ü😀x")


def test_unknown_token_stands_for_all_other_characters() -> None:
    tokenizer = CharTokenizer.from_text("abc", unknown_token="?")
    assert tokenizer.vocabulary == ["a", "b", "c", "?"]
    assert tokenizer.decode(tokenizer.encode("aXb\x01😀")) == "a?b??"


def test_unknown_token_of_the_text_keeps_its_place() -> None:
    tokenizer = CharTokenizer.from_text("a?z", unknown_token="?")
    assert tokenizer.vocabulary == ["?", "a", "z"]
    assert tokenizer.encode("b") == [0]


def test_repeated_characters_of_a_vocabulary_count_once() -> None:
    assert CharTokenizer("abab").vocabulary == ["a", "b"]


@pytest.mark.parametrize(("vocabulary", "unknown"), [(["a", "bc"], None), (["a", ""], None), (["a"], "bc")])
def test_a_token_must_be_one_character(vocabulary: list[str], unknown: str | None) -> None:
    with pytest.raises(TokenizerError, match="one character"):
        CharTokenizer(vocabulary, unknown)


@pytest.mark.parametrize("token", [-1, 2, 1000])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(TokenizerError, match=rf"{token} .*vocabulary size 2"):
        CharTokenizer("ab").decode([0, token])


@pytest.mark.parametrize("unknown", [None, "?", "a"])
@pytest.mark.parametrize("text", TEXTS)
def test_load_gives_back_what_was_saved(text: str, unknown: str | None, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(text, unknown)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CharTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(text) == tokenizer.encode(text)


def test_hash_is_equal_for_equal_ids_and_differs_otherwise() -> None:
    assert CharTokenizer.from_text("abc").hash() == CharTokenizer.from_text("cbaabc").hash()
    different = [CharTokenizer("abc"), CharTokenizer("acb"), CharTokenizer("abcd"), CharTokenizer("abc", "c")]
    assert len({tokenizer.hash() for tokenizer in different}) == len(different)


def saved(**changes: Any) -> str:
    return json.dumps({"type": "char", "version": 1, "vocabulary": ["a", "b"], "unknown_token": None} | changes)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param(saved()[:-5], id="truncated"),
        pytest.param("[]", id="list"),
        pytest.param("null", id="null"),
        pytest.param('{"type": "char", "version": 1}', id="no vocabulary"),
        pytest.param(saved(type="bpe"), id="another type"),
        pytest.param(saved(version=2), id="another version"),
        pytest.param(saved(vocabulary=None), id="vocabulary null"),
        pytest.param(saved(vocabulary=[1, 2]), id="vocabulary of numbers"),
        pytest.param(saved(vocabulary=["a", "bc"]), id="token of two characters"),
        pytest.param(saved(unknown_token=3), id="unknown token a number"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        CharTokenizer.load(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: damaged"):
        CharTokenizer.load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.json: no tokenizer file"):
        CharTokenizer.load(tmp_path / "nowhere.json")
