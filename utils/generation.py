"""Generation: prefill, decode_one_token, sample as small pure functions, and the loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model import KVCache, LanguageModel
from tokenizer import CharTokenizer
from utils.errors import UserError

GREEDY_BELOW = 1e-6  # temperatures under it differ from greedy only in ties


class GenerationError(UserError):
    """Sampling options that make no sense."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn. temperature 0 is greedy; top_k and top_p limit the candidates.

    Raises:
        GenerationError: out of bounds.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be a finite number >= 0 (0 is greedy), not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top-k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top-p must be above 0 and at most 1, not {self.top_p}")


def prefill(model: LanguageModel, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """One parallel pass over the prompt (B, T); logits (B, V) of the token after it."""
    logits, _ = model(idx, cache=cache)
    return logits[:, -1]


def decode_one_token(model: LanguageModel, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Append token (B, 1); logits (B, V) of the next one."""
    logits, _ = model(token, cache=cache)
    return logits[:, -1]


def filter_logits(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Logits (B, V) with -inf for the tokens that may not be drawn.

    top_k keeps the k most likely tokens and what ties with the last of them; top_p keeps the smallest
    set of most likely tokens whose probabilities reach p [Holtzman et al. 2020, nucleus sampling].
    """
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V)
        probabilities = ordered.softmax(-1)
        reached_before = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(reached_before.gather(-1, order.argsort(-1)), float("-inf"))
    return logits


def sample(logits: torch.Tensor, options: SamplingOptions, generator: torch.Generator) -> torch.Tensor:
    """Draw one token a row: logits (B, V) -> ids (B, 1)."""
    if options.temperature < GREEDY_BELOW:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() - logits.amax(
        -1, keepdim=True
    )  # at most 0: a small temperature cannot overflow to inf - inf
    logits = filter_logits(logits / options.temperature, options.top_k, options.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate_tokens(
    model: LanguageModel, prompt: list[int], max_new_tokens: int, options: SamplingOptions, seed: int
) -> Iterator[int]:
    """Token ids after `prompt`, one at a time; the global random state is left alone.

    Decoding is cached until the context is full; from there on each token is computed from the last
    block_size tokens anew.

    Args:
        model: in eval mode (dropout would draw from the global random state).
        prompt: at least one token id; only the last block_size of them are seen.
        seed: of the random stream of this sequence.
    """
    assert prompt
    assert not model.training
    parameter = next(model.parameters())
    block_size = model.config.block_size
    generator = torch.Generator(device=parameter.device).manual_seed(seed)
    tokens = list(prompt)
    cache = KVCache(model.config, 1, block_size, parameter.device, parameter.dtype)
    logits = prefill(model, torch.tensor([tokens[-block_size:]], device=parameter.device), cache)
    for index in range(max_new_tokens):
        token = sample(logits, options, generator)
        tokens.append(int(token))
        yield tokens[-1]
        if index + 1 == max_new_tokens:
            return
        if cache.length < block_size:
            logits = decode_one_token(model, token, cache)
        else:
            window = torch.tensor([tokens[-block_size:]], device=parameter.device)
            logits = model(window)[0][:, -1]


def start_tokens(tokenizer: CharTokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty prompt starts from a line break, or else the first token.

    Raises:
        TokenizerError: a character without a token.
    """
    if prompt:
        return tokenizer.encode(prompt)
    return tokenizer.encode("\n") if "\n" in tokenizer.vocabulary else [0]
