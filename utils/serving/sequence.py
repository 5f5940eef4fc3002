"""One text that the server is asked for, and the pieces in which it is delivered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizer import Tokenizer
from utils.inference.sampling import SamplingOptions
from utils.inference.text_stream import TextStream


class Token(NamedTuple):
    """A token and how likely the model found it.

    logprob: its natural logarithm, before any filter; None for the first token of a text, which nothing precedes.
    top: (token, logprob) of the most likely tokens in its place, the most likely first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What is new of a text.

    text: as far as later tokens cannot change it.
    prompt: the tokens of the prompt, if they are scored; in a piece before all others.
    finish: "stop" at a stop string or a token that ends the text, "length", or None: more follows.
    error: why there is no more, instead of all else.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    finish: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A text to generate.

    prompt: token ids, at least one.
    seed: of its random stream.
    max_new_tokens: 0: only the prompt is scored.
    top: how many of the most likely tokens to report in the place of each.
    scores_prompt: whether the tokens of the prompt are reported, too.
    ends: tokens that end the text, and are not part of it.
    cancelled: set by the reader, who wants no more.
    """

    prompt: list[int]
    tokenizer: Tokenizer
    options: SamplingOptions
    seed: int
    max_new_tokens: int
    stops: Sequence[str] = ()
    top: int = 0
    scores_prompt: bool = False
    ends: frozenset[int] = frozenset()
    cancelled: bool = False
    generated: int = 0
    asked: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.stops)

    def add(self, token: Token) -> Piece:
        """The piece that the next token makes; the job has ended if it is the last one."""
        self.generated += 1
        is_end = token.id in self.ends
        text = "" if is_end else self._stream.add(token.id)
        is_last = self.generated >= self.max_new_tokens
        finish = "stop" if is_end or self._stream.stopped else "length" if is_last else None
        if finish is not None:
            text += self._stream.rest()
        return Piece(text, (token,), finish=finish)
