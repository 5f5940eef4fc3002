"""Decoding of tokens to text one by one, in whole characters and without any part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # decoders give this for the first bytes of a character
MOST_PENDING = 64  # tokens in a row that may end within a character; more are not text


class TextStream:
    """The text of one sequence. Holds back the text that a later token could still change.

    Args:
        stops: strings that end the text and are not part of it; they may span several tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []  # the last tokens, if they end within a character
        self._taken = 0  # characters of their text that were returned
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Append a token; returns the text that this makes certain, or nothing after a stop string."""
        if self.stopped:
            return ""
        self._held += self._characters(token)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._take(min(places))
        return self._take(len(self._held) - max(map(self._overlap, self._stops), default=0))

    def extend(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Append tokens, up to one that completes a stop string.

        Returns:
            The text that this makes certain, and the number of tokens that were appended.
        """
        if not self.stopped and not self._tokens and len(tokens) < MOST_PENDING:  # decode them together
            held = self._held + self._tokenizer.decode(tokens)
            if not held.endswith(INCOMPLETE) and not any(stop in held for stop in self._stops):
                self._held = held
                return self._take(len(held) - max(map(self._overlap, self._stops), default=0)), len(tokens)
        text, count = "", 0
        while count < len(tokens) and not self.stopped:
            text += self.add(tokens[count])
            count += 1
        return text, count

    def rest(self) -> str:
        """Finish the text; returns the part that was held back, with U+FFFD for bytes of an incomplete character."""
        if self.stopped:
            return ""
        text = self._held + self._tokenizer.decode(self._tokens)[self._taken :]
        self._held, self._tokens, self._taken = "", [], 0
        return text

    def _characters(self, token: int) -> str:
        """The characters that one more token completes."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(INCOMPLETE) and len(self._tokens) < MOST_PENDING:
            new, self._taken = text[self._taken : -1], len(text) - 1
            return new
        new, self._tokens, self._taken = text[self._taken :], [], 0
        return new

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _overlap(self, stop: str) -> int:
        """The number of characters at the end of the held text that could be the beginning of `stop`."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)
