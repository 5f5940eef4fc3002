"""Response bodies of the API, for whole texts and for the events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizer import Tokenizer
from utils.inference.token_text import TokenCharacters, token_text
from utils.serving.sequence import Job, Piece, Token


class Echo(NamedTuple):
    """The prompt that a text begins with.

    text: the prompt.
    skip: tokens that the server put before it, which are not reported.
    """

    text: str = ""
    skip: int = 0


class Answer:
    """Writes the texts of a response; this class for /v1/completions.

    Args:
        top: number of most likely tokens to report at each position; None: no logprobs.
        echoes: the prompt of each text, if texts begin with their prompts.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, top: int | None, echoes: Sequence[Echo] | None = None) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._top, self._echoes = tokenizer, top, echoes
        self._texts: dict[int, str] = {}
        self._lengths: dict[int, int] = {}  # whole characters before the next token of each text
        self._characters: dict[int, TokenCharacters] = {}  # decodes the tokens of each text

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = token_text(self._tokenizer, token)
        return self._texts[token]

    def whole(self, pieces: Mapping[int, Piece], usage: Mapping[str, int]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        choices = [self.choice(index, pieces[index], is_first=True) for index in sorted(pieces)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        """The data of an event: the next part of one text."""
        return {**self._head, "object": self.chunk_kind, "choices": [self.delta(index, piece, is_first)], "usage": None}

    def last_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The data of the event that counts the tokens."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    def delta(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        return self.choice(index, piece, is_first)

    def choice(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        """A text, or a part of it."""
        echo = self._echoes[index] if self._echoes and is_first else Echo()
        logprobs = None
        if self._top is not None:
            logprobs = self._logprobs(index, [*piece.prompt[echo.skip :], *piece.tokens])
        return {"index": index, "text": echo.text + piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets, length = [], self._lengths.get(index, 0)
        characters = self._characters.setdefault(index, TokenCharacters(self._tokenizer))
        for token in tokens:
            unfinished, text = characters.add(token.id)
            length += len(unfinished)
            offsets.append(length)
            length += len(text)
        self._lengths[index] = length
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._tops(token) for token in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _tops(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens at the position of a token, and the token itself."""
        if token.logprob is None:
            return None
        tops: dict[str, float] = {}
        for top, logprob in token.top:
            tops.setdefault(self._text(top), logprob)
        tops.setdefault(self._text(token.id), token.logprob)
        return tops


class ChatAnswer(Answer):
    """Writes the texts of a response of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        return self._choice(index, piece, "message", {"role": "assistant", "content": piece.text})

    def delta(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return self._choice(index, piece, "delta", role | {"content": piece.text})

    def _choice(self, index: int, piece: Piece, name: str, content: Mapping[str, str]) -> dict[str, Any]:
        logprobs = None
        if self._top is not None:
            logprobs = {"content": [self._chat_token(token) for token in piece.tokens]}
        return {"index": index, name: content, "logprobs": logprobs, "finish_reason": piece.finish}

    def _chat_token(self, token: Token) -> dict[str, Any]:
        tops = [self._described(top, logprob) for top, logprob in token.top]
        return self._described(token.id, token.logprob) | {"top_logprobs": tops}

    def _described(self, token: int, logprob: float | None) -> dict[str, Any]:
        octets = list(self._tokenizer.decode_bytes([token]))
        return {"token": self._text(token), "logprob": logprob, "bytes": octets}


def usage(prompts: Sequence[int], jobs: Sequence[Job]) -> dict[str, int]:
    """Count the tokens of the prompts, each prompt once, and of all texts so far."""
    before, after = sum(prompts), sum(job.generated for job in jobs)
    return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}
