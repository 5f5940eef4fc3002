"""Where a long text can be cut without changing its tokens.

A subword tokenizer first splits a text into words, by a pattern, and then each word into tokens. A place where a word
ends whatever follows is therefore a safe boundary. Boundaries are found by a regular expression that matches two
characters; the cut is between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# In none of PATTERNS does a word continue with a space after a character that is not white space.
BEFORE_SPACE = re.compile(r"\S ")
# In GPT-2's pattern, a word never continues with white space, nor with punctuation after a letter. The letters and
# punctuation listed here are such in every version of Unicode; a newer letter may be punctuation to an older library.
GPT2_BOUNDARY = re.compile(
    r"\S[ \n\r\t]|[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
    r"[!\"(),./:;?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The word patterns of published tokenizers: GPT-2; Llama 3 and GPT-4; Qwen 2.
PATTERNS = frozenset((_GPT2, _LLAMA3, _LLAMA3.replace("{1,3}", "")))
UNICODE_FORMS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"))
CUTTING = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer"))  # split at each space
# Where these split depends only on the neighbouring characters.
LOCAL = frozenset(("Digits", "Punctuation", "UnicodeScripts", "CharDelimiterSplit", "ByteLevel"))


def chunks(text: str, boundary: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """Cut `text` into parts of at least `size` characters that end at a boundary; without boundaries, one part."""
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size) if boundary else None
        end = found.start() + 1 if found else len(text)
        yield text[start:end]
        start = end


def boundary_of(specification: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The regular expression for safe boundaries of a tokenizer.json; None if none is known."""
    added = [token for token in specification.get("added_tokens") or [] if not token.get("special")]
    if any(token.get("rstrip") or re.search(r"\s", token["content"].strip()) for token in added):
        return None  # such a token may extend across a boundary
    if not all(part["type"] in UNICODE_FORMS for part in _parts(specification.get("normalizer"), "normalizers")):
        return None
    parts = _parts(specification.get("pre_tokenizer"), "pretokenizers")
    if len(parts) == 1 and _is_gpt2(parts[0]) and not added:
        return GPT2_BOUNDARY
    known = all(_cuts(part) or part["type"] in LOCAL for part in parts)
    return BEFORE_SPACE if known and any(map(_cuts, parts)) else None


def decoder_of(specification: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The decoder of a tokenizer.json; if it has none, the one that inverts its word splitting, if that is known."""
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
    """The components of a normalizer or pre-tokenizer: the members of a sequence, or the part itself."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _is_gpt2(part: Mapping[str, Any]) -> bool:
    return part["type"] == "ByteLevel" and part.get("use_regex", True) and not part["add_prefix_space"]


def _cuts(part: Mapping[str, Any]) -> bool:
    """Whether this pre-tokenizer ends a word before each space that follows a non-space character."""
    match part["type"]:
        case "ByteLevel":
            return bool(part.get("use_regex", True))
        case "Metaspace":
            return bool(part.get("split", True))
        case "Split":
            kept = part.get("behavior") == "Isolated" and not part.get("invert")
            return bool(kept and part["pattern"].get("Regex") in PATTERNS)
    return part["type"] in CUTTING
