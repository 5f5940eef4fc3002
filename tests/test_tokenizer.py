"""Tokenizers: round trips, files, errors, and a new kind of tokenizer used throughout the workbench."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenizer import KINDS, CharTokenizer, Tokenizer, TokenizerError, build_tokenizer, load_tokenizer
from utils.config.settings import TOKENIZERS, Config, DataConfig
from utils.errors import UserError

TEXTS = ["a", "hello world\n", "tab\tnul\x00\r\n", "übergrößenträger", "кириллица и 漢字", "astral 😀 and 𝔊𝔬𝔱𝔥𝔦𝔠 🏴"]


def from_text(text: str, unknown_token: str | None = None) -> CharTokenizer:
    tokenizer = build_tokenizer(DataConfig(unknown_token=unknown_token), [text])
    assert isinstance(tokenizer, CharTokenizer)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_follow_the_order_of_code_points() -> None:
    tokenizer = from_text("cab😀a\n")
    assert tokenizer.vocabulary == ["\n", "a", "b", "c", "😀"]
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("abc😀\n") == [1, 2, 3, 4, 0]


def test_an_astral_character_is_one_token() -> None:
    assert len(from_text("😀😀x").encode("😀x😀")) == 3


def test_encode_array_holds_the_ids_of_encode() -> None:
    tokenizer = from_text("hello wörld")
    ids = tokenizer.encode_array("hello")
    assert (ids.shape, ids.dtype) == ((5,), np.dtype(np.int64))
    assert ids.tolist() == tokenizer.encode("hello")


def test_an_empty_text_has_no_tokens() -> None:
    tokenizer = from_text("ab")
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
        from_text("ab").encode(text)


def test_unknown_position_counts_characters_not_bytes() -> None:
    with pytest.raises(TokenizerError, match="position 3 "):
        from_text("😀ü").encode("😀ü😀x")


def test_unknown_token_stands_for_all_other_characters() -> None:
    tokenizer = from_text("abc", "?")
    assert tokenizer.vocabulary == ["a", "b", "c", "?"]
    assert tokenizer.decode(tokenizer.encode("aXb\x01😀")) == "a?b??"


def test_unknown_token_of_the_text_keeps_its_place() -> None:
    tokenizer = from_text("a?z", "?")
    assert tokenizer.vocabulary == ["?", "a", "z"]
    assert tokenizer.encode("b") == [0]


def test_a_vocabulary_has_each_character_once() -> None:
    with pytest.raises(TokenizerError, match="twice"):
        CharTokenizer("aba")


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
    tokenizer = from_text(text, unknown)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(text) == tokenizer.encode(text)


def test_hash_is_equal_for_equal_ids_and_differs_otherwise() -> None:
    assert from_text("abc").hash() == from_text("cbaabc").hash()
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
        pytest.param(saved(type="pair"), id="an unknown type"),
        pytest.param(saved(type=["char"]), id="a list of types"),
        pytest.param(saved(version=2), id="another version"),
        pytest.param(saved(vocabulary=None), id="vocabulary null"),
        pytest.param(saved(vocabulary=[1, 2]), id="vocabulary of numbers"),
        pytest.param(saved(vocabulary=["a", "bc"]), id="token of two characters"),
        pytest.param(saved(unknown_token=3), id="unknown token a number"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: damaged"):
        load_tokenizer(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.json: no tokenizer file"):
        load_tokenizer(tmp_path / "nowhere.json")


def test_special_tokens_are_named() -> None:
    assert from_text("abc").special_tokens == {}
    assert from_text("abc", "?").special_tokens == {"unknown": 3}
    assert from_text("a\0", "?").special_tokens == {"unknown": 2, "end_of_text": 0}


def test_the_token_that_begins_a_document_has_no_bytes() -> None:
    tokenizer = from_text("a\0ü")
    assert (from_text("abc").end_of_text, tokenizer.end_of_text) == (None, 0)
    assert tokenizer.byte_counts().tolist() == [0, 1, 2]


def test_tokens_decode_to_the_bytes_of_their_text() -> None:
    tokenizer = from_text("aü😀\ud800")
    assert tokenizer.decode_bytes(tokenizer.encode("ü😀a")) == "ü😀a".encode()
    assert tokenizer.decode_bytes(tokenizer.encode("\ud800")) == b"\xed\xa0\x80"


def test_a_tokenizer_is_built_from_several_texts() -> None:
    assert build_tokenizer(DataConfig(), ["ba", "", "cb"]).to_json() == from_text("abc").to_json()


# -------------------------------------------------------------------------- a new kind of tokenizer


class PairTokenizer(Tokenizer):
    """The tokens are all characters, and all pairs of characters that begin at an even position."""

    kind = "pair"

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    @classmethod
    def build(cls, config: DataConfig, texts: Iterable[str]) -> PairTokenizer:
        pieces = {
            piece for text in texts for i in range(0, len(text), 2) for piece in (text[i : i + 2], *text[i : i + 2])
        }
        return cls(sorted(pieces))

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def special_tokens(self) -> dict[str, int]:
        return {}

    def encode_array(self, text: str) -> np.ndarray:
        ids, place = [], 0
        while place < len(text):
            piece = text[place : place + 2] if text[place : place + 2] in self.pieces else text[place]
            if piece not in self.pieces:
                raise TokenizerError(f"{piece!r} has no token")
            ids.append(self.pieces.index(piece))
            place += len(piece)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[int(token)] for token in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "version": 1, "pieces": self.pieces}

    @classmethod
    def from_json(cls, data: Any) -> PairTokenizer:
        return cls(data["pieces"])


@pytest.fixture
def pair_run(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps whose tokens are mostly two characters long."""
    from train import train

    monkeypatch.setitem(KINDS, "pair", PairTokenizer)
    config = Config.model_validate(
        {
            "data": {"dataset": str(tiny_corpus), "corpora_dir": str(tmp_path / "corpora")},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
            "train": {"batch_size": 4, "max_iters": 2, "eval_iters": 1, "threads": 1},
            "tracking": {"runs_dir": str(tmp_path / "runs"), "sample_tokens": 4, "sample_prompt": "line"},
        }
    )
    data = config.data.model_copy(update={"tokenizer": "pair"})  # no setting can name it yet
    train(config.model_copy(update={"data": data}), quiet=True)
    (run,) = (tmp_path / "runs").iterdir()
    return run


def test_a_new_kind_of_tokenizer_trains_generates_and_scores(pair_run: Path, tiny_text: str) -> None:
    from utils.inference.generator import Generator, Request

    tokenizer = load_tokenizer(pair_run / "meta" / "tokenizer.json")
    assert isinstance(tokenizer, PairTokenizer)
    record = json.loads((pair_run / "run.json").read_text())
    n_tokens = len(tokenizer.encode(tiny_text))
    assert n_tokens < 0.6 * len(tiny_text)
    assert record["resolved"]["train_tokens"] + record["resolved"]["val_tokens"] == n_tokens
    assert record["resolved"]["vocab_size"] == tokenizer.vocab_size
    generator = Generator.from_export(pair_run / "artifacts" / "export")
    completion = generator.generate("line 1", Request(12))
    assert len(completion.tokens) == 12 < len(completion.text) == len(tokenizer.decode(completion.tokens))
    assert "".join(generator.stream("line 1", Request(12))) == completion.text
    score = generator.score("line 1")
    assert (score.tokens, score.bytes) == (2, 4)  # "li" is not predicted, "ne" and " 1" are


def test_the_tokens_of_a_stop_string_are_struck_out_whatever_their_length(pair_run: Path) -> None:
    from utils.inference.generator import Completion
    from utils.inference.page import completion_page
    from utils.inference.side_by_side import RunCompletions

    tokenizer = load_tokenizer(pair_run / "meta" / "tokenizer.json")
    tokens = tokenizer.encode("line 1")
    completion = Completion("", "line", tokens, [-1.0] * len(tokens), "stop", 7)
    page = completion_page([RunCompletions("pairs", 1.5, [completion], tokenizer)])
    assert [" stop" in words for words in re.findall(r'<span class="(t p\d[^"]*)" title', page)] == [False, False, True]


def test_no_other_module_names_a_kind_of_tokenizer() -> None:
    root = Path(__file__).resolve().parents[1]
    files = [*root.glob("*.py"), *root.glob("utils/**/*.py"), *root.glob("benchmarks/*.py")]
    naming = {path.name for path in files for kind in KINDS.values() if kind.__name__ in path.read_text()}
    assert naming == {"tokenizer.py", "byte_tokens.py", "subwords.py"}


def test_the_setting_tokenizer_offers_every_kind() -> None:
    assert {*TOKENIZERS, "hf"} == KINDS.keys()
