"""The text of single tokens when a character may span several: their bytes, and the characters that they complete."""

from __future__ import annotations

import codecs

from tokenizer import Tokenizer
from utils.inference.text_stream import INCOMPLETE


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, or its bytes if it is part of a character: bytes:\\xe2\\x82."""
    text = tokenizer.decode([token])
    if INCOMPLETE not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.decode_bytes([token]))


class TokenCharacters:
    """The characters that each token of a text completes, with U+FFFD for bytes that are not a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> tuple[str, str]:
        """Add a token.

        Returns:
            U+FFFD for unfinished bytes of the tokens before, if this token does not continue them, and the characters
            that this token completes.
        """
        is_whole = INCOMPLETE not in self._tokenizer.decode([token])
        unfinished = self.rest() if is_whole else ""
        return unfinished, self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def rest(self) -> str:
        """U+FFFD for bytes of the last tokens that no token completed."""
        return self._decoder.decode(b"", final=True)
