"""Where a long text may be cut so that the tokens of its parts are those of the whole.

A subword tokenizer first cuts a text into words, by a pattern, and then each word into tokens. So a place where a word
ends, whatever follows, is a safe boundary. A boundary is found by a pattern of two characters: the cut is between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# No word of the patterns in PATTERNS goes on with a space after another character.
BEFORE_SPACE = re.compile(r"\S ")
# A word of GPT-2 goes on with no white space at all, and with no punctuation after a letter. The letters and the
# punctuation here are such in every version of Unicode: a newer letter may be punctuation to an older library.
GPT2_BOUNDARY = re.compile(
    r"\S[ \n\r\t]|[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
    r"[!\"(),./:;?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Patterns of words, as published tokenizers have them: GPT-2; Llama 3 and GPT-4; Qwen 2.
PATTERNS = frozenset((_GPT2, _LLAMA3, _LLAMA3.replace("{1,3}", "")))
UNICODE_FORMS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"))
CUTTING = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer"))  # at each space
LOCAL = frozenset(("Digits", "Punctuation", "UnicodeScripts", "CharDelimiterSplit", "ByteLevel"))  # by neighbours


def chunks(text: str, boundary: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """`text` in parts of at least `size` characters that end at a boundary; all of it without boundaries."""
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size) if boundary else None
        end = found.start() + 1 if found else len(text)
        yield text[start:end]
        start = end


def boundary_of(specification: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The safe boundaries of a tokenizer.json; None if they are not known."""
    added = [token for token in specification.get("added_tokens") or [] if not token.get("special")]
    if any(token.get("rstrip") or re.search(r"\s", token["content"].strip()) for token in added):
        return None  # such a token may reach over a boundary
    if not all(part["type"] in UNICODE_FORMS for part in _parts(specification.get("normalizer"), "normalizers")):
        return None
    parts = _parts(specification.get("pre_tokenizer"), "pretokenizers")
    if len(parts) == 1 and _is_gpt2(parts[0]) and not added:
        return GPT2_BOUNDARY
    known = all(_cuts(part) or part["type"] in LOCAL for part in parts)
    return BEFORE_SPACE if known and any(map(_cuts, parts)) else None


def decoder_of(specification: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The decoder of a tokenizer.json; of one without it, the inverse of how it cuts words, if that is known."""
    if (decoder := specification.get("decoder")) is not None:
        return decoder
    for part in _parts(specification.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] in ("ByteLevel", "Metaspace"):
            return part  # the decoder of the same name has the same settings
    model = specification["model"]
    if model.get("type") == "WordPiece":
        return {"type": "WordPiece", "prefix": model.get("continuing_subword_prefix", "##"), "cleanup": True}
    return None


def _parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The members of a sequence, or the only one."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _is_gpt2(part: Mapping[str, Any]) -> bool:
    return part["type"] == "ByteLevel" and part.get("use_regex", True) and not part["add_prefix_space"]


def _cuts(part: Mapping[str, Any]) -> bool:
    """Whether a word ends before each space that follows another character."""
    match part["type"]:
        case "ByteLevel":
            return bool(part.get("use_regex", True))
        case "Metaspace":
            return bool(part.get("split", True))
        case "Split":
            kept = part.get("behavior") == "Isolated" and not part.get("invert")
            return bool(kept and part["pattern"].get("Regex") in PATTERNS)
    return part["type"] in CUTTING
