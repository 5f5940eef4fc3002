"""Speculative decoding: a draft proposes the next tokens, and one pass of the model judges all of them.

A pass over a few tokens takes hardly longer than a pass over one, because both read all weights once. Tokens are
accepted, and rejected ones replaced, so that the text has exactly the distribution of the model alone [Leviathan et al.
2023; Chen et al. 2023]. A draft is a smaller model, or the text itself: it proposes what followed the last occurrence
of the last few tokens [Saxena 2023, prompt lookup decoding].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from model import LanguageModel
from utils.inference.decode import Block, decode_one_token, make_room, prefill
from utils.inference.graphs import DecoderPool, Graphs
from utils.inference.sampling import GREEDY_BELOW, SamplingOptions, filter_logits
from utils.inference.static import bucket
from utils.nn.lean import lean
from utils.nn.static_cache import StaticCache

PROPOSED = 5  # tokens at a time
LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2  # tokens that are looked up


def probabilities(logits: torch.Tensor, options: SamplingOptions, seen: torch.Tensor | None = None) -> torch.Tensor:
    """The distribution (R, V), float64, that `sample` draws from; one-hot for greedy sampling.

    Args:
        logits: (R, V), as the model gives them.
        seen: see `filter_logits`.
    """
    filtered = filter_logits(logits, options, seen)
    if options.temperature < GREEDY_BELOW:
        return one_hot(filtered.argmax(-1), logits.size(-1))
    return filtered.double().softmax(-1)


def one_hot(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """One-hot rows (R, V), float64, of tokens (R,)."""
    zeros = torch.zeros(len(tokens), vocab_size, dtype=torch.float64, device=tokens.device)
    return zeros.scatter_(1, tokens[:, None], 1.0)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw a token (R,) from each row of the unnormalised distributions p (R, V), by random numbers (R,) in [0, 1)."""
    reached = p.cumsum(-1)  # (R, V)
    tokens = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
    return tokens.clamp_(max=p.size(-1) - 1)  # searchsorted gives V for NaN


def judge(
    p: torch.Tensor, q: torch.Tensor, proposed: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept proposals one after the other, each with probability min(1, p / q), up to the first that is rejected.

    The token after them is drawn from max(p - q, 0), normalised, or from p if all were accepted.

    Args:
        p: (K + 1, V), the model's distributions of the proposed tokens and of the one after them.
        q: (K, V), the draft's distributions, from which the proposals were drawn.
        proposed: (K,) tokens.
        uniform: (K + 1,) random numbers in [0, 1).

    Returns:
        (K + 1,) tokens: those accepted, then the one after them, repeated to the end; and the number accepted, (1,).
    """
    K = len(proposed)
    of_p, of_q = (x[:K].gather(1, proposed[:, None])[:, 0] for x in (p, q))  # (K,)
    accepted = (uniform[:K] * of_q < of_p).long().cumprod(0).sum(0, keepdim=True)  # (1,)
    rest = torch.cat(((p[:K] - q).clamp_min_(0), p[K:])).index_select(0, accepted)  # (1, V)
    exists = rest.sum(-1, keepdim=True) > 0  # true after a rejection, except for rounding
    rest = torch.where(exists, rest, p.index_select(0, accepted))
    token = draw(rest, uniform[K:])  # (1,)
    is_accepted = torch.arange(K + 1, device=p.device) < accepted
    return torch.where(is_accepted, torch.cat((proposed, token)), token), accepted


class Draft(Protocol):
    """Proposes the next tokens of one sequence.

    proposed: (K,) tokens on the device.
    """

    proposed: torch.Tensor

    @property
    def q(self) -> torch.Tensor | None:
        """(K, V), the distributions that `proposed` is drawn from; None: the draft is certain of its tokens."""

    def start(self, options: SamplingOptions) -> None:
        """Begin a text."""

    def propose(self, text: list[int], uniform: torch.Tensor) -> bool:
        """Set `proposed` and `q`, given the tokens so far and K random numbers; returns False without a proposal."""

    def keep(self, accepted: int) -> None:
        """Keep the first `accepted` of the last proposals, and forget the rest."""


class NgramDraft:
    """Proposes what followed the last occurrence of the last few tokens, the longest such n-gram first."""

    q = None

    def __init__(self, count: int, device: torch.device) -> None:
        self.proposed = torch.zeros(count, dtype=torch.int64, device=device)

    def start(self, options: SamplingOptions) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its last occurrence ends
        self._indexed = 0  # tokens of the text whose n-grams are in _after

    def propose(self, text: list[int], uniform: torch.Tensor) -> bool:
        lengths = range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1)
        for end in range(self._indexed + 1, len(text)):  # without the n-grams at the end, which are looked up
            for length in lengths:
                if end >= length:
                    self._after[tuple(text[end - length : end])] = end
        self._indexed = len(text) - 1
        place = next((place for n in lengths if (place := self._after.get(tuple(text[-n:]))) is not None), None)
        if place is None:
            return False
        count = len(self.proposed)
        found = text[place : place + count]
        while len(found) < count:  # it reaches the end of the text, which repeats itself
            found += found[: count - len(found)]
        self.proposed.copy_(torch.tensor(found))
        return True

    def keep(self, accepted: int) -> None:
        """Nothing is kept: `propose` reads the text itself."""


class ModelDraft:
    """Proposes tokens drawn from a smaller model.

    Args:
        vocab_size: V of the model that judges. The draft has the same tokenizer, but its embedding may have more or
            fewer rows, beyond those of the tokens.
    """

    def __init__(self, model: LanguageModel, count: int, vocab_size: int) -> None:
        parameter = next(model.parameters())
        device, block_size = parameter.device, model.config.block_size
        self._lean, self._count, self._graphs = lean(model), count, Graphs(device)
        self._cache = StaticCache(model.config, 1, block_size, device, parameter.dtype)
        self._kept = min(block_size // 2, block_size - count - 1)  # tokens of the text in a renewed cache
        assert self._kept > 0
        self._rows = min(model.vocab_size, vocab_size)
        self._logits = torch.full((1, vocab_size), float("-inf"), device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._uniform = torch.zeros(count, dtype=torch.float64, device=device)
        self.proposed = torch.zeros(count, dtype=torch.int64, device=device)
        self.q = torch.zeros(count, vocab_size, dtype=torch.float64, device=device)

    def start(self, options: SamplingOptions) -> None:
        self._options = replace(options, repetition_penalty=1.0)  # any q leads to the distribution of the model
        self._known = 0  # tokens of the text in the cache

    def propose(self, text: list[int], uniform: torch.Tensor) -> bool:
        if len(text) - self._known != 1 or self._cache.lengths[0] + self._count + 1 > self._cache.capacity:
            self._renew(text)
        self._token.fill_(min(text[-1], self._rows - 1))
        self._uniform.copy_(uniform)
        self._row.zero_()
        for _ in range(self._count):
            self._decode()
            self._graphs.run(self._options, self._draw)
        self._decode()  # puts the last proposal into the cache
        self._known = len(text) + self._count
        return True

    def _renew(self, text: list[int]) -> None:
        """Fill the cache with the last tokens of the text, except the very last one."""
        self._cache.reset()
        idx = torch.tensor([text[-self._kept - 1 : -1]], device=self._token.device)  # (1, T)
        if idx.numel():
            self._lean.hidden(idx.clamp(max=self._rows - 1), self._cache)

    def _decode(self) -> None:
        attended = bucket(self._cache.lengths[0] + 1, self._cache.capacity)

        def work() -> None:
            with self._cache.static_pass(attended):
                logits = decode_one_token(self._lean, self._token, self._cache)
                self._logits[:, : self._rows].copy_(logits[:, : self._rows])

        self._graphs.run(attended, work)
        self._cache.count(1)

    def _draw(self) -> None:
        q = probabilities(self._logits, self._options)  # (1, V)
        token = draw(q, self._uniform.index_select(0, self._row))  # (1,)
        self._token.copy_(token)
        self.proposed.index_copy_(0, self._row, token)
        self.q.index_copy_(0, self._row, q)
        self._row += 1

    def keep(self, accepted: int) -> None:
        rejected = self._count - accepted
        self._cache.forget(rejected)
        self._known -= rejected


class Speculator:
    """Generates one sequence at a time, with a draft. Its tensors and graphs are reused for the next text.

    Call its methods in inference mode.

    Args:
        model: in eval mode.
        draft: a smaller model with the same vocabulary, in eval mode; None: n-grams of the text itself.
        count: number of tokens to propose at a time.
    """

    def __init__(self, model: LanguageModel, draft: LanguageModel | None, count: int = PROPOSED) -> None:
        parameter = next(model.parameters())
        device = parameter.device
        self._config, self._device, self._model, self._lean = model.config, device, model, lean(model)
        self._draft: Draft = NgramDraft(count, device) if draft is None else ModelDraft(draft, count, model.vocab_size)
        self._graphs, self._count = Graphs(device), count
        self._cache = StaticCache(model.config, 1, model.config.block_size, device, parameter.dtype)
        self._logits = torch.zeros(count + 1, model.vocab_size, device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)  # the newest token
        self._seen = torch.zeros(1, model.vocab_size, dtype=torch.bool, device=device)
        self._uniform = torch.zeros(2 * count + 1, dtype=torch.float64, device=device)
        self._result = torch.zeros(2 * count + 3, dtype=torch.float64, device=device)

    def blocks(
        self, prompt: Sequence[int], max_new_tokens: int, options: SamplingOptions, seed: int
    ) -> Iterator[Block]:
        """Yield the tokens after a prompt, one block for each pass."""
        self._options, self._generator = options, torch.Generator().manual_seed(seed)
        self._cache.reset()
        self._seen.zero_()
        self._seen[0, list(prompt)] = True
        self._draft.start(options)
        idx = torch.tensor([prompt[-self._config.block_size :]], device=self._device)
        self._logits[:1] = prefill(self._lean, idx, self._cache)
        self._draw_uniform()
        self._judge(0)
        tokens, logprobs, _ = self._read(0)
        yield Block([tokens], [logprobs], 1, self._cache.lengths[0])
        text, missing = [*prompt, *tokens], max_new_tokens - 1
        while missing > 0:
            proposed = self._propose(text)
            tokens, logprobs, accepted = self._pass(proposed)
            text += tokens
            context = min(self._cache.lengths[0] + proposed - accepted, self._cache.capacity)
            yield Block([tokens[:missing]], [logprobs[:missing]], 1, context, proposed, accepted)
            missing -= len(tokens)

    def _propose(self, text: list[int]) -> int:
        """Ask the draft for proposals; returns their number: `count`, or 0 if it has none or the cache is full."""
        if self._config.position == "learned":
            make_room(self._model, self._cache)
        self._draw_uniform()
        # A window slides by one token at a time: what a rejected token had overwritten would be lost.
        has_room = self._cache.lengths[0] + self._count + 1 <= self._cache.capacity
        return self._count if has_room and self._draft.propose(text, self._uniform[: self._count]) else 0

    def _draw_uniform(self) -> None:
        numbers = torch.rand(len(self._uniform), dtype=torch.float64, generator=self._generator)
        self._uniform.copy_(numbers)

    def _pass(self, proposed: int) -> tuple[list[int], list[float], int]:
        """Run one pass over the newest token and the proposals.

        Returns:
            The new tokens, their log-probabilities, and the number of accepted proposals.
        """
        longest = self._cache.lengths[0] + proposed + 1
        attended = bucket(longest, self._cache.capacity)
        slides = longest > self._config.block_size

        def work() -> None:
            idx = torch.cat((self._token, self._draft.proposed[:proposed]))[None]  # (1, K + 1)
            with self._cache.static_pass(attended):
                hidden = self._lean.hidden(idx, self._cache)  # (1, K + 1, C)
            self._logits[: proposed + 1] = self._lean.head_logits(hidden)[0]

        self._graphs.run((proposed, attended, slides), work)
        self._cache.count(proposed + 1)
        self._graphs.run((proposed, self._options), lambda: self._judge(proposed))
        tokens, logprobs, accepted = self._read(proposed)
        if proposed:
            self._cache.forget(proposed - accepted)
            self._draft.keep(accepted)
        return tokens, logprobs, accepted

    def _judge(self, proposed: int) -> None:
        """Turn the logits of a pass into `_result`: the number accepted, the tokens, and their log-probabilities."""
        logits, tokens = self._logits[: proposed + 1], self._draft.proposed[:proposed]
        seen = self._seen
        if self._options.repetition_penalty != 1 and proposed:
            new = one_hot(tokens, logits.size(1)).cumsum(0) > 0  # (K, V)
            seen = seen | torch.cat((torch.zeros_like(seen), new))  # (K + 1, V)
        p = probabilities(logits, self._options, seen)
        q = one_hot(tokens, logits.size(1)) if self._draft.q is None else self._draft.q[:proposed]
        uniform = self._uniform[self._count : self._count + proposed + 1]
        tokens, accepted = judge(p, q, tokens, uniform)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]  # (K + 1,)
        self._token.copy_(tokens[-1:])
        self._seen.scatter_(1, tokens[None], True)
        result = torch.cat((accepted.double(), tokens.double(), logprobs.double()))
        self._result[: len(result)] = result

    def _read(self, proposed: int) -> tuple[list[int], list[float], int]:
        """Read the result of `_judge`; waits for the device."""
        accepted, *numbers = self._result[: 2 * proposed + 3].tolist()
        count = int(accepted) + 1
        return [int(number) for number in numbers[:count]], numbers[proposed + 1 :][:count], int(accepted)


class Speculators:
    """The speculators of a model and a draft, kept from text to text."""

    def __init__(self, draft: LanguageModel | None, count: int) -> None:
        self._draft, self._count = draft, count
        self._pool: DecoderPool[Speculator] = DecoderPool()

    @torch.inference_mode()
    def generate(
        self, model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, options: SamplingOptions, seed: int
    ) -> Iterator[Block]:
        """Generate the next tokens of one sequence, with a sliding window: see `decode.generate` for the arguments.

        Greedy tokens are those of `decode.generate`, except for rounding. Sampled ones have the same distribution.
        """
        assert prompt
        assert not model.training
        models = [model] if self._draft is None else [model, self._draft]
        with self._pool.borrow(1, models, lambda: Speculator(model, self._draft, self._count)) as speculator:
            yield from speculator.blocks(prompt, max_new_tokens, options, seed)
