"""A tokenizer in GGUF, for llama.cpp: byte-pair encoding of words, which are found by a pattern with a name.

Tokens of one character or one byte can be written as byte-pair encoding, too: merges join the bytes of a character.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizer import Tokenizer
from utils.formats.table import FormatError
from utils.tokenization.vocabularies import END_OF_TEXT, byte_level_alphabet

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in GGUF
NO_MERGE = "ĀĀ ĀĀ"  # never applies, because no merge makes its parts; readers reject an empty list
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}  # the parts of a number, by the name of the pattern
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the metadata of GGUF describe it.

    model: the algorithm, as in `tokenizer.ggml.model`.
    pattern: of the words, as in `tokenizer.ggml.pre`; None if the algorithm has none.
    end: the id of the token that ends a text.
    notes: differences from our tokenizer, for the model card.
    """

    model: str
    pattern: str | None
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    end: int | None
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Translate a tokenizer so that llama.cpp gives the same ids.

    Raises:
        FormatError: GGUF cannot hold the tokenizer; the message says why.
    """
    facts = json.loads(tokenizer.huggingface())
    model = facts["model"]
    kind = model.get("type", "BPE")
    if kind == "WordLevel":
        return _characters(tokenizer, facts)
    if kind != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(facts.get("pre_tokenizer")):
        fallback = " with byte fallback" if model.get("byte_fallback") else ""
        raise FormatError(f"GGUF cannot hold this tokenizer: {kind}{fallback}; expected byte-level BPE or characters")
    return _byte_pairs(tokenizer, facts)


def _byte_pairs(tokenizer: Tokenizer, facts: Mapping[str, Any]) -> Vocabulary:
    model = facts["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pattern = pattern_of(facts) if pairs else "gpt-2"  # without merges each byte is a token, so the words do not matter
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise FormatError(f"GGUF cannot hold this tokenizer: {key} {model[key]!r}")
    if bool(model.get("ignore_merges")) != (pattern == "llama-bpe"):
        raise FormatError(f"GGUF cannot hold this tokenizer: ignore_merges with the words of {pattern}")
    tokens = [f"[UNUSED_{place}]" for place in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * len(tokens)
    for token, place in model["vocab"].items():
        tokens[place], kinds[place] = token, NORMAL
    for added in facts.get("added_tokens") or []:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    end = tokenizer.end_of_text
    if end is None:
        raise FormatError(
            "GGUF cannot hold this tokenizer: it has no token that ends a text, and llama.cpp would use another as such"
        )
    if kinds[end] == NORMAL:  # the byte 0, which does not occur in texts
        tokens[end], kinds[end] = END_OF_TEXT, CONTROL
    notes = []
    if facts.get("normalizer"):
        if facts["normalizer"] != {"type": "NFC"}:
            raise FormatError(f"GGUF cannot hold this tokenizer: normalizer {facts['normalizer'].get('type')}")
        notes.append("llama.cpp does not normalise text to NFC, as the tokenizer does.")
    return Vocabulary("gpt2", pattern, tokens, kinds, pairs or [NO_MERGE], end, notes)


def pattern_of(facts: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pattern by which a tokenizer finds words.

    Args:
        facts: a tokenizer.json with a pre-tokenizer.

    Raises:
        FormatError: llama.cpp does not have the pattern.
    """
    split = facts["pre_tokenizer"]
    steps = [_relevant(step) for step in (split["pretokenizers"] if split["type"] == "Sequence" else [split])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    known = {
        "gpt-2": [byte_level | {"use_regex": True}],
        "smollm": [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}],
    }
    for name, digits in DIGITS.items():
        words = {"Regex": CONTRACTIONS + WORDS % digits}
        found = {"type": "Split", "pattern": words, "behavior": "Isolated", "invert": False}
        known[name] = [found, byte_level | {"use_regex": False}]
    for name, expected in known.items():
        if steps == expected:
            return name
    kinds = ", ".join(step["type"] for step in steps)
    raise FormatError(
        f"GGUF cannot hold this tokenizer: its pre-tokenizer ({kinds}) is none of llama.cpp's: {', '.join(known)}"
    )


def _relevant(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of a pre-tokenizer, without the options that do not change ids."""
    found = {key: value for key, value in step.items() if key != "trim_offsets"}
    return {**found, "use_regex": found.get("use_regex", True)} if step["type"] == "ByteLevel" else found


def _characters(tokenizer: Tokenizer, facts: Mapping[str, Any]) -> Vocabulary:
    vocab: dict[str, int] = facts["model"]["vocab"]
    split = (facts.get("pre_tokenizer") or {}).get("pattern")
    if split != {"Regex": "[\\s\\S]"} or any(len(token) != 1 for token in vocab):
        raise FormatError("GGUF cannot hold this tokenizer: WordLevel with tokens of more than one character")
    if facts["model"].get("unk_token") in vocab:
        raise FormatError(
            "GGUF cannot hold this tokenizer: unknown_token, one token for each character without a token of its own"
        )
    end = tokenizer.end_of_text
    characters = sorted(vocab, key=lambda character: vocab[character])
    kinds = [CONTROL if place == end else NORMAL for place in range(len(characters))]
    if end is None:
        # Byte-pair encoding needs a token that ends a text. RWKV's algorithm needs none, but llama.cpp loops forever on
        # a character that is not in the vocabulary and begins with the same byte as one that is.
        if not all(character.isascii() for character in characters):
            raise FormatError(
                "GGUF cannot hold this tokenizer: characters beyond ASCII without a token that ends a text; llama.cpp "
                "would use another as such"
            )
        return Vocabulary("rwkv", None, [ESCAPES.get(token, token) for token in characters], kinds, [], None)
    names = {byte: character for character, byte in byte_level_alphabet().items()}
    tokens, merges = [], dict[str, None]()
    for place, character in enumerate(characters):
        parts = [names[byte] for byte in character.encode()]
        tokens.append(END_OF_TEXT if place == end else "".join(parts))
        merges |= {f"{''.join(parts[:count])} {parts[count]}": None for count in range(1, len(parts))}
    note = "llama.cpp leaves out characters that have no token; here they are an error."
    return Vocabulary("gpt2", "gpt-2", tokens, kinds, list(merges) or [NO_MERGE], end, [note])
