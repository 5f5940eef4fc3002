"""What single tokens say where a character may take several of them: their bytes, and the characters they complete."""

from __future__ import annotations

import codecs

from tokenizer import Tokenizer
from utils.inference.text_stream import INCOMPLETE


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; of one that is part of a character, its bytes: bytes:\\xe2\\x82."""
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
        """What the tokens before this one leave unfinished, if it does not go on with that; what it completes."""
        is_whole = INCOMPLETE not in self._tokenizer.decode([token])
        unfinished = self.rest() if is_whole else ""
        return unfinished, self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def rest(self) -> str:
        """What the last tokens leave unfinished."""
        return self._decoder.decode(b"", final=True)
