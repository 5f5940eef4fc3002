"""The export to GGUF, read by an independent reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.formats.conftest import LLAMA_LIKE
from tests.formats.gguf_reader import GGUF
from tests.tiny_export import char_tokenizer, save_tiny_run, tiny_model
from tokenizer import Tokenizer, build_tokenizer, tokenizer_from_json
from utils.config.settings import DataConfig
from utils.errors import UserError
from utils.formats.gguf import export_gguf, stored_model
from utils.formats.gguf_tokenizer import CONTROL, UNUSED, vocabulary_of
from utils.formats.source import Source
from weights import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # where the packages are installed
TOKENIZER = char_tokenizer("\0 \nabcdefghijklmnopqrstuvwxyzüABQ:?.")
TEXT = "The 42 cats,\n\n\tnaïve café — 日本語 🙂👩‍👩‍👧 Ā ﬁ \u00a0 don't  1234567 x\r\n \\n"
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 8}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"position": "learned", "mlp": "gelu_tanh"},
    "gpt2, no biases, untied": {"position": "learned", "mlp": "gelu_tanh", "bias": False, "tie_embeddings": False},
    "llama": {**LLAMA_LIKE, "n_kv_head": 2},
    "llama, biases, wide heads, untied": {**LLAMA_LIKE, "bias": True, "head_dim": 12, "tie_embeddings": False},
    "llama, linear": {**LLAMA_LIKE, "rope_scaling": "linear", "rope_factor": 2.0},
    "llama 3": {**LLAMA_LIKE, **LLAMA3},
    "mistral, window as long as the context": {**LLAMA_LIKE, "sliding_window": 16},
    "qwen2": {**LLAMA_LIKE, "qkv_bias": True, "n_kv_head": 1},
    "qwen3": {**LLAMA_LIKE, "qk_norm": True, "qk_norm_weights": True, "head_dim": 12},
    "qwen3, norms without weights": {**LLAMA_LIKE, "qk_norm": True},
}


def source(tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Source:
    return Source("ours", tiny_model(tokenizer, **{"n_embd": 32, "n_head": 4, **settings}), tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_an_independent_reader_computes_our_logits(name: str, tmp_path: Path) -> None:
    ours = source(**MODELS[name])
    assert ours.model.config.block_size == 16
    export_gguf(ours, tmp_path / "out")
    ids = [int(place) for place in torch.arange(16) * 7 % TOKENIZER.vocab_size]
    with torch.no_grad():
        expected = ours.model(torch.tensor([ids]))[0][0].numpy()
    read = GGUF(tmp_path / "out" / "model.gguf")
    assert np.abs(read.logits(ids) - expected).max() < 1e-4
    assert read.metadata["general.architecture"] == name.replace("mistral", "llama").split(",")[0].split(" ")[0]
    assert "output.weight" in read.tensors  # even if it is tied


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_smaller_types_round_only_matrices(kind: str, tmp_path: Path) -> None:
    ours = source(**MODELS["qwen2"], ffn_dim=40)
    found = export_gguf(ours, tmp_path / "out", kind=kind)
    read = GGUF(tmp_path / "out" / "model.gguf")
    assert {read.types[name] for name in read.types if "norm" in name or name.endswith("bias")} == {0}
    assert read.types["blk.0.attn_q.weight"] == {"F16": 1, "Q8_0": 8}[kind]
    assert read.types["blk.0.ffn_down.weight"] == 1  # 40 is not a multiple of 32
    assert any("2 tensors are F16" in note for note in found["notes"]) == (kind == "Q8_0")
    ids = list(range(12))
    with torch.no_grad():
        rounded = stored_model(tmp_path / "out" / "model.gguf", ours)(torch.tensor([ids]))[0][0].numpy()
        exact = ours.model(torch.tensor([ids]))[0][0].numpy()
    assert np.abs(read.logits(ids) - rounded).max() < 1e-4 < np.abs(rounded - exact).max()


TOKENIZERS = {
    "ascii": lambda: char_tokenizer([chr(code) for code in (9, 10, 13, *range(32, 127))]),
    "characters with an end": lambda: char_tokenizer(["\0", *sorted(set(TEXT + "ab"))]),
    "byte": lambda: build_tokenizer(DataConfig(tokenizer="byte"), []),
    "bpe": lambda: build_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=290), [TEXT * 3 + "the cats"]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_vocabulary_gives_our_ids(kind: str, tmp_path: Path) -> None:
    ours = TOKENIZERS[kind]()
    export_gguf(source(ours, **MODELS["llama"]), tmp_path / "out")
    read = GGUF(tmp_path / "out" / "model.gguf")
    text = "".join(character for character in TEXT if kind != "ascii" or character.isascii())
    assert read.encode(text) == ours.encode(text)
    assert len(read.metadata["tokenizer.ggml.tokens"]) == ours.vocab_size
    assert read.metadata.get("tokenizer.ggml.eos_token_id") == ours.end_of_text
    if ours.end_of_text is not None:
        assert read.metadata["tokenizer.ggml.tokens"][ours.end_of_text] == "<|endoftext|>"
        assert read.metadata["tokenizer.ggml.token_type"][ours.end_of_text] == CONTROL


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # of the others it ignores scaling, widths or biases
def test_the_reader_of_transformers_agrees(name: str, tmp_path: Path) -> None:
    import transformers

    ours = source(TOKENIZERS["bpe"](), **MODELS[name])
    export_gguf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(16)[None] * 7 % ours.tokenizer.vocab_size
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - ours.model(ids)[0]).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(TEXT)


def test_rows_without_a_token_are_unused() -> None:
    specification = TOKENIZERS["bpe"]().huggingface()
    form = {"type": "hf", "version": 1, "tokenizer": specification, "vocab_size": 300}
    found = vocabulary_of(tokenizer_from_json(form, "a test"))
    assert len(found.tokens) == len(set(found.tokens)) == 300
    assert found.kinds[-1] == UNUSED


def changed_bpe(**changes: Any) -> Tokenizer:
    facts = json.loads(TOKENIZERS["bpe"]().huggingface()) | changes
    return tokenizer_from_json({"type": "hf", "version": 1, "tokenizer": json.dumps(facts)}, "a test")


DIGITS = {"type": "Digits", "individual_digits": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("settings", "tokenizer", "words"),
    [
        (
            {"position": "learned", "mlp": "gelu"},
            lambda: TOKENIZER,
            r"gpt2 does not support mlp gelu \(only gelu_tanh",
        ),
        ({**LLAMA_LIKE, "sliding_window": 5}, lambda: TOKENIZER, "sliding_window 5"),
        ({**LLAMA_LIKE, "qkv_bias": True, **LLAMA3}, lambda: TOKENIZER, "rope_scaling llama3"),
        ({**LLAMA_LIKE, "logit_softcap": 5.0}, lambda: TOKENIZER, "logit_softcap 5"),
        (LLAMA_LIKE, lambda: char_tokenizer("abc", "?"), "unknown_token"),
        (LLAMA_LIKE, lambda: char_tokenizer("abcü"), "characters beyond ASCII without a token that ends a text"),
        (LLAMA_LIKE, lambda: changed_bpe(added_tokens=[]), "no token that ends a text"),
        (LLAMA_LIKE, lambda: changed_bpe(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (
            LLAMA_LIKE,
            lambda: changed_bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}),
            r"pre-tokenizer \(Digits, ByteLevel\)",
        ),
    ],
)
def test_settings_that_the_format_cannot_hold_are_refused_by_name(
    settings: dict[str, Any], tokenizer: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export_gguf(source(tokenizer(), **settings), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_run(tmp_path, "base", TOKENIZER, **LLAMA_LIKE)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", "base", "--format", "gguf", "--runs-dir", str(tmp_path)]) == 2
    assert "needs the package gguf: pip install gguf" in capsys.readouterr().err
