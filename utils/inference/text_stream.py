"""Tokens to text as they come: never half a character, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character
MOST_PENDING = 64  # tokens in a row that end within a character; a model that writes more writes no text


class TextStream:
    """The text of one sequence. What could still become something else is held back.

    Args:
        stops: strings that end the text; they may lie across tokens, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []  # the last of which ends within a character
        self._taken = 0  # characters of their text
        self._held = ""  # that a stop string may begin with

    def add(self, token: int) -> str:
        """The text that is certain with one more token; after a stop string nothing is."""
        if self.stopped:
            return ""
        self._held += self._characters(token)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._take(min(places))
        return self._take(len(self._held) - max(map(self._overlap, self._stops), default=0))

    def rest(self) -> str:
        """What was held back when no more tokens come; bytes that are no character stand as U+FFFD."""
        if self.stopped:
            return ""
        text = self._held + self._tokenizer.decode(self._tokens)[self._taken :]
        self._held, self._tokens, self._taken = "", [], 0
        return text

    def _characters(self, token: int) -> str:
        """What one more token completes."""
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
        """How many characters at the end of what is held could be the beginning of `stop`."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)
