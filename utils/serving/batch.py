"""The running batch of one model: texts join after a pass over their prompt and leave when they end.

The tokens of a text depend neither on what else is in the batch nor on when it joined, except for rounding: products of
matrices with more rows are summed in another order. Each text has its own random stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from utils.inference.decode import decode_one_token, make_room, new_cache
from utils.inference.generator import Generator
from utils.inference.sampling import RandomStreams, SamplingOptions, sample
from utils.nn.lean import lean
from utils.nn.slot_cache import SlotCache
from utils.serving.sequence import Job, Piece, Token

DIVERGED = "the model's logits are NaN: its training diverged"
SCORED_AT_ONCE = 256  # tokens of a prompt whose logits exist at a time


class Delivery(NamedTuple):
    """A piece of the text of a job."""

    job: Job
    piece: Piece


@dataclass(eq=False)
class _Row:
    """A text in the batch.

    numbers: the next random numbers, in reverse.
    newest: the last token, which is not in the cache yet.
    seen: (V,) bool, tokens that occur in the text; needed with a repetition penalty.
    """

    job: Job
    numbers: list[float] = field(default_factory=list)
    streams: RandomStreams | None = None
    newest: int = 0
    seen: torch.Tensor | None = None

    def number(self, device: torch.device) -> float:
        """The next number of the job's random stream, as RandomStreams.draw would give it."""
        if self.streams is None:
            self.streams = RandomStreams([self.job.seed], device)
        if not self.numbers:
            self.numbers = self.streams.draw_ahead()[:, 0].tolist()[::-1]
        return self.numbers.pop()


class Batch:
    """At most `slots` texts that a model generates together. Call its methods in inference mode."""

    def __init__(self, generator: Generator, slots: int) -> None:
        self._model, self._lean = generator.model, lean(generator.model)
        parameter = next(generator.model.parameters())
        config = generator.model.config
        self._device, self._block_size = parameter.device, config.block_size
        self._vocab_size = generator.model.vocab_size
        self._cache = SlotCache(config, slots, config.block_size, parameter.device, parameter.dtype)
        self._prompt_cache = new_cache(generator.model, 1)
        self._rows: list[_Row] = []
        self.slots = slots

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_room(self) -> bool:
        return len(self._rows) < self.slots

    def clear(self) -> list[Job]:
        """Free all slots; returns their jobs."""
        jobs = [row.job for row in self._rows]
        while self._rows:
            self._leave(len(self._rows) - 1)
        return jobs

    def drop_cancelled(self) -> int:
        """Free the slots of cancelled jobs; returns their number."""
        gone = [place for place, row in enumerate(self._rows) if row.job.cancelled]
        for place in reversed(gone):  # last first, because the last row takes the place of the one that leaves
            self._leave(place)
        return len(gone)

    def join(self, job: Job) -> list[Delivery]:
        """Run one pass over the prompt and draw the first token; a job that needs more tokens takes a slot."""
        prompt = job.prompt[-self._block_size :]
        self._prompt_cache.reset()
        hidden = self._lean.hidden(torch.tensor([prompt], device=self._device), self._prompt_cache)  # (1, T, C)
        delivered = []
        if job.scores_prompt:
            delivered.append(Delivery(job, Piece(prompt=self._score(prompt, hidden[0], job.top))))
        if job.max_new_tokens == 0:
            return [*delivered, Delivery(job, Piece(finish="length"))]
        row = _Row(job)
        if job.options.repetition_penalty != 1:
            row.seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            row.seen[job.prompt] = True
        drawn = self._draw([row], self._lean.head_logits(hidden[:, -1]))
        if not drawn[-1].piece.is_last:
            self._cache.join(self._prompt_cache)
            self._rows.append(row)
        return delivered + drawn

    def step(self) -> list[Delivery]:
        """Generate the next token of each job in a slot."""
        if self._model.config.position == "learned":
            make_room(self._model, self._cache)
        newest = torch.tensor([row.newest for row in self._rows], device=self._device)
        delivered = self._draw(self._rows, decode_one_token(self._lean, newest, self._cache))
        for place in range(len(delivered) - 1, -1, -1):
            if delivered[place].piece.is_last:
                self._leave(place)
        return delivered

    def _leave(self, place: int) -> None:
        self._cache.leave(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last

    def _draw(self, rows: list[_Row], logits: torch.Tensor) -> list[Delivery]:
        """Draw the next token of each row from logits (B, V)."""
        tokens = self._sample(rows, logits)  # (B,)
        logprobs = logits.float().log_softmax(-1)  # (B, V)
        chosen: list[float] = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
        tops = _top(logprobs, max(row.job.top for row in rows))
        delivered = []
        for row, token, logprob, top in zip(rows, tokens.tolist(), chosen, tops, strict=True):
            row.newest = token
            is_number = not math.isnan(logprob)
            piece = row.job.add(Token(token, logprob, top[: row.job.top])) if is_number else Piece(error=DIVERGED)
            delivered.append(Delivery(row.job, piece))
        return delivered

    def _sample(self, rows: list[_Row], logits: torch.Tensor) -> torch.Tensor:
        """Draw the next token of each row, (B,); rows with the same options are drawn together."""
        numbers = torch.tensor([row.number(self._device) for row in rows], dtype=torch.float64)
        uniform = numbers.to("cpu" if self._device.type == "mps" else self._device)  # (B,)
        groups: dict[SamplingOptions, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.job.options, []).append(place)
        if len(groups) == 1:
            return _sample(logits, rows[0].job.options, uniform, rows)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for places in groups.values():
            group = [rows[place] for place in places]
            index = torch.tensor(places, device=logits.device)
            options = group[0].job.options
            tokens[index] = _sample(logits[index], options, uniform[index.to(uniform.device)], group)
        return tokens

    def _score(self, prompt: Sequence[int], hidden: torch.Tensor, count: int) -> tuple[Token, ...]:
        """The tokens of a prompt, each with its logprob given those before; hidden (T, C)."""
        found = [Token(prompt[0], None)]
        for first in range(0, len(prompt) - 1, SCORED_AT_ONCE):
            targets = prompt[first + 1 : first + 1 + SCORED_AT_ONCE]
            logits = self._lean.head_logits(hidden[first : first + len(targets)])  # (n, V)
            logprobs = logits.float().log_softmax(-1)
            index = torch.tensor(targets, device=logits.device)[:, None]
            chosen: list[float] = logprobs.gather(-1, index)[:, 0].tolist()
            found += map(Token, targets, chosen, _top(logprobs, count))
        return tuple(found)


def _sample(
    logits: torch.Tensor, options: SamplingOptions, uniform: torch.Tensor, rows: Sequence[_Row]
) -> torch.Tensor:
    """Draw the next token of each row, (B,), all with the same options."""
    seen = [row.seen for row in rows if row.seen is not None]
    tokens = sample(logits, options, uniform, torch.stack(seen) if seen else None)
    for of_row, token in zip(seen, tokens, strict=False):
        of_row[token] = True
    return tokens


def _top(logprobs: torch.Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """(token, logprob) of the `count` most likely tokens of each row (B, V)."""
    if count == 0:
        return [()] * len(logprobs)
    values, tokens = logprobs.topk(min(count, logprobs.size(-1)))  # (B, count)
    return [tuple(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
