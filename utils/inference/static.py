"""Decoding by CUDA graphs: the host only launches, and reads the tokens a block behind.

A small model's token is hundreds of kernels of two microseconds each, which Python launches five times as slowly as
the device runs them. So the pass of a token is recorded as one graph and the drawing of the next one as another, and
all that changes from token to token is in tensors that advance on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from model import LanguageModel
from utils.inference.decode import Block, decode_one_token, make_room, padded, prefill
from utils.inference.graphs import Graphs, Reserve
from utils.inference.sampling import AHEAD, RandomStreams, SamplingOptions, sample
from utils.nn.lean import lean
from utils.nn.static_cache import StaticCache

TOKENS_A_BLOCK = 8  # of each sequence, read together
SMALLEST_BUCKET = 256  # slots that attention covers at least


def bucket(tokens: int, capacity: int) -> int:
    """The slots that attention covers for so many tokens: 256, 512, 1024, ..., at most the capacity."""
    slots = SMALLEST_BUCKET
    while slots < tokens:
        slots *= 2
    return min(slots, capacity)


class Report(NamedTuple):
    """Tokens on their way to the host."""

    tokens: torch.Tensor  # (n, B)
    chances: torch.Tensor  # (n, B)
    context: int
    arrived: torch.cuda.Event | None

    def read(self) -> Block:
        if self.arrived is not None:
            self.arrived.synchronize()
        return Block(self.tokens.t().tolist(), self.chances.t().tolist(), len(self.tokens), self.context)


class StaticDecoder:
    """Generates `batch_size` sequences at a time. Its tensors and graphs serve one text after the other.

    Its methods are called in inference mode.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        parameter = next(model.parameters())
        device, B, V = parameter.device, batch_size, model.vocab_size
        self._config, self._device, self._model, self._lean = model.config, device, model, lean(model)
        self._graphs = Graphs(device)
        self._cache = StaticCache(model.config, B, model.config.block_size, device, parameter.dtype)
        self._logits = torch.zeros(B, V, device=device)
        self._tokens = torch.zeros(B, dtype=torch.int64, device=device)  # the newest
        self._seen = torch.zeros(B, V, dtype=torch.bool, device=device)
        self._uniform = torch.zeros(AHEAD, B, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(AHEAD, B, dtype=torch.int64, device=device)
        self._chances = torch.zeros(AHEAD, B, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)  # of the last three, the next one
        self._next = AHEAD  # _row, as the host counts; AHEAD: their numbers are used up

    def start(self, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]) -> None:
        """One parallel pass over the prompts."""
        assert len(prompts) == len(seeds) == len(self._tokens)
        self._options, self._streams, self._next = options, RandomStreams(seeds, self._device), AHEAD
        if options.repetition_penalty != 1:
            self._seen.zero_()
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True
        idx, lengths = padded([prompt[-self._config.block_size :] for prompt in prompts], self._device)
        self._cache.reset()
        self._logits.copy_(prefill(self._lean, idx, self._cache, None if len(set(lengths)) == 1 else lengths))

    @property
    def context(self) -> int:
        """Tokens attended to in the pass that gave the newest logits, summed over the sequences."""
        return sum(min(length, self._cache.capacity) for length in self._cache.lengths)

    def draw(self) -> None:
        """The next token of each sequence, from the newest logits."""
        if self._next == AHEAD:
            self._uniform.copy_(self._streams.draw_ahead())
            self._row.zero_()
            self._next = 0
        self._graphs.run(self._options, self._draw)
        self._next += 1

    def _draw(self) -> None:
        uniform = self._uniform.index_select(0, self._row)[0]  # (B,)
        penalised = self._options.repetition_penalty != 1
        tokens = sample(self._logits, self._options, uniform, self._seen if penalised else None)  # (B,)
        chances = self._logits.log_softmax(-1).gather(-1, tokens[:, None])  # (B, 1)
        if penalised:
            self._seen.scatter_(1, tokens[:, None], True)
        self._tokens.copy_(tokens)
        self._drawn.index_copy_(0, self._row, tokens[None])
        self._chances.index_copy_(0, self._row, chances.t())
        self._row += 1

    def decode(self) -> None:
        """Append the newest tokens; computes the logits of the next ones."""
        if self._config.position == "learned":
            make_room(self._model, self._cache)
        longest = max(self._cache.lengths) + 1
        attended = bucket(longest, self._cache.capacity)
        # Past the context, rotary factors are computed instead of looked up.
        self._graphs.run((attended, longest > self._config.block_size), lambda: self._decode(attended))
        self._cache.count(1)

    def _decode(self, attended: int) -> None:
        with self._cache.static_pass(attended):
            self._logits.copy_(decode_one_token(self._lean, self._tokens, self._cache))

    def report(self, count: int, context: int) -> Report:
        """The last `count` tokens of each sequence, on their way to the host."""
        rows = slice(self._next - count, self._next)
        tokens, chances = (ring[rows].to("cpu", non_blocking=True) for ring in (self._drawn, self._chances))
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        return Report(tokens, chances, context, arrived)

    def blocks(self, max_new_tokens: int) -> Iterator[Block]:
        """The first token of each sequence after `start`, then blocks of several; the device is a block ahead."""
        on_the_way: deque[Report] = deque()
        launched = 0
        while launched < max_new_tokens or on_the_way:
            if launched < max_new_tokens:
                count = min(TOKENS_A_BLOCK, max_new_tokens - launched, AHEAD - self._next or AHEAD) if launched else 1
                context = 0
                for _ in range(count):
                    if launched:
                        self.decode()
                    self.draw()
                    launched += 1
                    context += self.context
                on_the_way.append(self.report(count, context))
            if len(on_the_way) > 1 or launched == 1 or launched == max_new_tokens:
                yield on_the_way.popleft().read()


class StaticDecoders:
    """The static decoders of a model, which serve one text after the other."""

    def __init__(self) -> None:
        self._reserve: Reserve[StaticDecoder] = Reserve()

    @torch.inference_mode()
    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        seeds: Sequence[int],
    ) -> Iterator[Block]:
        """The tokens of `generate` with a sliding window. See there for the arguments."""
        assert all(prompts)
        assert not model.training
        B = len(prompts)
        with self._reserve.borrow(B, [model], lambda: StaticDecoder(model, B)) as decoder:
            decoder.start(prompts, options, seeds)
            yield from decoder.blocks(max_new_tokens)
