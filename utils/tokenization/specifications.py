"""The workbench's own tokenizers as tokenizer.json files, the format of the package tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from utils.tokenization.protocol import TokenizerError
from utils.tokenization.vocabularies import END_OF_TEXT, byte_level_alphabet


def _specification(model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], **more: Any) -> str:
    parts: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(parts | more, ensure_ascii=False, separators=(",", ":"))


def character_specification(vocabulary: Sequence[str], unknown_token: str | None) -> str:
    """One token for each character: a WordLevel model in which every character is a word.

    Raises:
        TokenizerError: a character is half a surrogate pair, which a tokenizer.json cannot hold.
    """
    if any("\ud800" <= character <= "\udfff" for character in vocabulary):
        raise TokenizerError("tokenizer char: half a surrogate pair is a token, which no tokenizer.json can hold")
    # A word outside the vocabulary gets the id of unk_token; if that is not in the vocabulary either, it is an error.
    model = {
        "type": "WordLevel",
        "vocab": {character: place for place, character in enumerate(vocabulary)},
        "unk_token": unknown_token or "",
    }
    # [\\s\\S] is any character, line breaks included.
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    return _specification(model, split, {"type": "Fuse"})


def _byte_pairs(vocab: dict[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def byte_specification() -> str:
    """One token for each byte of UTF-8: byte-pair encoding without merges."""
    model = _byte_pairs({character: byte for character, byte in byte_level_alphabet().items()}, [])
    return _specification(model, _byte_level(False), _byte_level(False))


def gpt2_specification(merges: str) -> str:
    """The encoding of GPT-2, from the content of vocab.bpe."""
    pairs = [line.split(" ") for line in merges.splitlines()[1:] if line]
    vocab = {character: place for place, character in enumerate(byte_level_alphabet())}
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    end = {
        "id": len(vocab),
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return _specification(_byte_pairs(vocab, pairs), _byte_level(True), _byte_level(True), added_tokens=[end])
