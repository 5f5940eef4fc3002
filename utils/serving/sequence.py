"""One text that the server generates, and the pieces in which it is delivered."""

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

    logprob: the natural logarithm of its probability, before any filter; None for the first token of a text.
    top: (token, logprob) of the most likely tokens at its position, the most likely first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """The next piece of a text.

    text: new characters that no later token can change.
    tokens: new tokens.
    prompt: the tokens of the prompt, if they are scored; they come in the first piece.
    finish: "stop" at a stop string or a token that ends the text, "length", or None: more follows.
    error: why the text cannot be continued; the other fields are then empty.
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
    seed: seed of its random stream.
    max_new_tokens: 0: only the prompt is scored.
    top: number of most likely tokens to report at each position.
    scores_prompt: whether the tokens of the prompt are reported, too.
    ends: tokens that end the text and are not part of it.
    cancelled: set when the client wants no more.
    generated: number of tokens so far.
    asked: time of the request (time.perf_counter).
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
        """Append a token; returns the piece of text that it makes certain, the last one if the job has ended."""
        self.generated += 1
        is_end = token.id in self.ends
        text = "" if is_end else self._stream.add(token.id)
        is_last = self.generated >= self.max_new_tokens
        finish = "stop" if is_end or self._stream.stopped else "length" if is_last else None
        if finish is not None:
            text += self._stream.rest()
        return Piece(text, (token,), finish=finish)
