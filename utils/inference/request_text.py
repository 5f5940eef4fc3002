"""What a person types for a request: escapes, stop strings, banned tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizer import CharTokenizer, TokenizerError
from utils.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str) -> str:
    r"""A shell cannot easily give a line break: \n, \t, \r and \\ stand for what they do in Python."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def stop_strings(tokenizer: CharTokenizer, texts: Sequence[str]) -> tuple[str, ...]:
    """Stop strings with escapes.

    Raises:
        UserError: empty, or a character that the model cannot write.
    """
    stops = tuple(unescape(text) for text in texts)
    for stop in stops:
        _encode(tokenizer, stop, "stop")
    return stops


def banned_tokens(tokenizer: CharTokenizer, texts: Sequence[str], before: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids of all tokens of texts with escapes, and those banned before.

    Raises:
        UserError: empty, a character without a token, or nothing is left to draw.
    """
    banned = sorted({*before, *(token for text in texts for token in _encode(tokenizer, unescape(text), "ban"))})
    if len(banned) == tokenizer.vocab_size:
        raise UserError(f"ban: all {len(banned)} tokens of the vocabulary are banned, at least one must be left")
    return tuple(banned)


def _encode(tokenizer: CharTokenizer, text: str, name: str) -> list[int]:
    if not text:
        raise UserError(f"{name}: expected text, got an empty one")
    try:
        return tokenizer.encode(text)
    except TokenizerError as error:
        raise UserError(f"{name} {text!r}: {error}") from None
