"""Decoding with CUDA graphs: the host only launches them, and reads the tokens one block behind.

A token of a small model takes hundreds of kernels of two microseconds each, and Python needs five times as long to
launch them as the device to run them. So the pass of a token is recorded as one graph and the sampling of the next one
as another; everything that changes from token to token is in tensors on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from model import LanguageModel
from utils.inference.decode import Block, decode_one_token, make_room, padded, prefill
from utils.inference.graphs import DecoderPool, Graphs
from utils.inference.sampling import AHEAD, RandomStreams, SamplingOptions, sample
from utils.nn.lean import lean
from utils.nn.static_cache import StaticCache

TOKENS_A_BLOCK = 8  # tokens of each sequence that the host reads together
SMALLEST_BUCKET = 256  # the fewest slots that attention covers


def is_static(device: torch.device) -> bool:
    """Whether static decoders generate the text on this device; on a CPU they would gain nothing."""
    return device.type == "cuda"


def bucket(tokens: int, capacity: int) -> int:
    """The number of slots that attention covers for `tokens` tokens: 256, 512, 1024, ..., at most the capacity."""
    slots = SMALLEST_BUCKET
    while slots < tokens:
        slots *= 2
    return min(slots, capacity)


class Report(NamedTuple):
    """Tokens on their way to the host."""

    tokens: torch.Tensor  # (n, B)
    logprobs: torch.Tensor  # (n, B)
    context: int
    arrived: torch.cuda.Event | None

    def read(self) -> Block:
        if self.arrived is not None:
            self.arrived.synchronize()
        return Block(self.tokens.t().tolist(), self.logprobs.t().tolist(), len(self.tokens), self.context)


class StaticDecoder:
    """Generates `batch_size` sequences at a time. Its tensors and graphs are reused for the next texts.

    Call its methods in inference mode.

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
        self._tokens = torch.zeros(B, dtype=torch.int64, device=device)  # the newest tokens
        self._seen = torch.zeros(B, V, dtype=torch.bool, device=device)
        self._uniform = torch.zeros(AHEAD, B, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(AHEAD, B, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(AHEAD, B, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)  # the next row of the three tensors above
        self._next = AHEAD  # _row as counted on the host; AHEAD: all random numbers are used up

    def start(self, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]) -> None:
        """Begin new sequences: run one parallel pass over the prompts."""
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
        """Draw the next token of each sequence from the newest logits."""
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
        logprobs = self._logits.log_softmax(-1).gather(-1, tokens[:, None])  # (B, 1)
        if penalised:
            self._seen.scatter_(1, tokens[:, None], True)
        self._tokens.copy_(tokens)
        self._drawn.index_copy_(0, self._row, tokens[None])
        self._logprobs.index_copy_(0, self._row, logprobs.t())
        self._row += 1

    def decode(self) -> None:
        """Append the newest tokens to the cache and compute the logits of the next ones."""
        if self._config.position == "learned":
            make_room(self._model, self._cache)
        longest = max(self._cache.lengths) + 1
        attended = bucket(longest, self._cache.capacity)
        # Past the context, rotary factors are computed instead of looked up, which takes another graph.
        self._graphs.run((attended, longest > self._config.block_size), lambda: self._decode(attended))
        self._cache.count(1)

    def _decode(self, attended: int) -> None:
        with self._cache.static_pass(attended):
            self._logits.copy_(decode_one_token(self._lean, self._tokens, self._cache))

    def report(self, count: int, context: int) -> Report:
        """Start to copy the last `count` tokens of each sequence to the host."""
        rows = slice(self._next - count, self._next)
        tokens, logprobs = (ring[rows].to("cpu", non_blocking=True) for ring in (self._drawn, self._logprobs))
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        return Report(tokens, logprobs, context, arrived)

    def blocks(self, max_new_tokens: int) -> Iterator[Block]:
        """Yield the first token of each sequence after `start`, then blocks of several; the device is a block ahead."""
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
    """The static decoders of a model, kept from text to text."""

    def __init__(self) -> None:
        self._pool: DecoderPool[StaticDecoder] = DecoderPool()

    @torch.inference_mode()
    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        seeds: Sequence[int],
    ) -> Iterator[Block]:
        """Generate the tokens of `decode.generate` with a sliding window. See there for the arguments."""
        assert all(prompts)
        assert not model.training
        B = len(prompts)
        with self._pool.borrow(B, [model], lambda: StaticDecoder(model, B)) as decoder:
            decoder.start(prompts, options, seeds)
            yield from decoder.blocks(max_new_tokens)
