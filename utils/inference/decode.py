"""Token generation: prefill and decode_one_token as small functions, and the loop over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from model import LanguageModel
from tokenizer import Tokenizer, TokenizerError
from utils.inference.sampling import RandomStreams, SamplingOptions, sample
from utils.nn.kv_cache import KVCache
from utils.nn.lean import lean

Window = Literal["sliding", "exact"]


class NewTokens(NamedTuple):
    """One new token of each of B sequences."""

    tokens: torch.Tensor  # (B,)
    logits: torch.Tensor  # (B, V), of the model, before any filter
    context: int  # tokens attended to in the pass that gave the logits, summed over the sequences


class Block(NamedTuple):
    """n new tokens of each of B sequences, on the host."""

    tokens: list[list[int]]  # (B, n)
    logprobs: list[list[float]]  # (B, n), natural logarithms of the model's probabilities, before any filter
    passes: int  # forward passes of the model: n, or fewer if a draft proposes tokens
    context: int  # tokens attended to in these passes, summed over passes and sequences
    proposed: int = 0  # tokens that a draft proposed
    accepted: int = 0  # proposed tokens that the model accepted


def new_cache(model: LanguageModel, batch_size: int, capacity: int | None = None) -> KVCache:
    """An empty cache for `batch_size` sequences of at most `capacity` tokens (default: block_size)."""
    parameter = next(model.parameters())
    return KVCache(model.config, batch_size, capacity or model.config.block_size, parameter.device, parameter.dtype)


def prefill(
    model: LanguageModel, idx: torch.Tensor, cache: KVCache | None, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """Run one parallel pass over the prompts (B, T); returns the logits (B, V) of the token after each.

    Call it with gradients off.

    Args:
        cache: an empty cache, which the pass fills; None: keys and values are dropped.
        lengths: the number of tokens of each prompt, if they differ; shorter prompts are padded at their end.
    """
    hidden = model.hidden(idx, cache, lengths)  # (B, T, C)
    if lengths is None:
        return model.head_logits(hidden[:, -1])
    last = torch.tensor(lengths, device=idx.device) - 1
    return model.head_logits(hidden[torch.arange(len(idx), device=idx.device), last])


def decode_one_token(model: LanguageModel, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Append tokens (B,) to the cache; returns the logits (B, V) of the next ones.

    With rotary positions, a full window slides. Call it with gradients off, because the cache is written in place.
    """
    return model.head_logits(model.hidden(tokens.unsqueeze(1), cache).squeeze(1))


def make_room(model: LanguageModel, cache: KVCache) -> None:
    """Replace each full window by its newer half, because with learned positions a window cannot slide.

    This takes one parallel pass over half a context for every half context of new tokens.
    """
    full = [row for row, length in enumerate(cache.lengths) if length == cache.capacity]
    if not full:
        return
    half = cache.capacity // 2
    newest = new_cache(model, len(full), half or 1)
    if half:
        idx = cache.tokens[:, -half:]  # (B, half)
        model.hidden(idx if len(full) == len(idx) else idx[full], newest)
    cache.replace(full, newest)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: SamplingOptions,
    seeds: Sequence[int],
    window: Window = "sliding",
) -> Iterator[NewTokens]:
    """Generate the next tokens of each sequence, one step at a time, without waiting for the device.

    The tokens of a sequence depend neither on the rest of its batch (except for rounding) nor on the global random
    state.

    Args:
        model: in eval mode (dropout would draw from the global random state).
        prompts: B lists of at least one token id; the model sees only the last block_size of each.
        seeds: the seed of the random stream of each sequence.
        window: what a token attends to once block_size tokens precede it. sliding: with rotary positions, the last
            block_size tokens in the cache, whose keys and values were computed while older tokens were still visible;
            with learned positions, half of a context to all of it (`make_room`). exact: the last block_size tokens,
            recomputed for each new token, which waits for the device.
    """
    assert all(prompts)
    assert len(prompts) == len(seeds)
    assert not model.training
    device, block_size = next(model.parameters()).device, model.config.block_size
    lean_model = lean(model)
    idx, lengths = padded([prompt[-block_size:] for prompt in prompts], device)
    streams, cache = RandomStreams(seeds, device), new_cache(model, len(prompts))
    seen = None
    if options.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    logits = prefill(lean_model, idx, cache, None if len(set(lengths)) == 1 else lengths)
    context = sum(lengths)
    history: list[list[int]] | None = None
    for index in range(max_new_tokens):
        tokens = sample(logits, options, streams.draw(), seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        yield NewTokens(tokens, logits, context)
        if index + 1 == max_new_tokens:
            return
        if window == "exact" and max(cache.lengths) == block_size:
            if history is None:
                history = [row[:length] for row, length in zip(cache.tokens.tolist(), cache.lengths, strict=True)]
            history = [(row + [token])[-block_size:] for row, token in zip(history, tokens.tolist(), strict=True)]
            idx, lengths = padded(history, device)
            logits, context = prefill(lean_model, idx, None, lengths), sum(lengths)
        else:
            if model.config.position == "learned":
                make_room(model, cache)
            logits = decode_one_token(lean_model, tokens, cache)
            context = sum(min(length, cache.capacity) for length in cache.lengths)


@torch.inference_mode()
def generate_blocks(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: SamplingOptions,
    seeds: Sequence[int],
    window: Window = "sliding",
) -> Iterator[Block]:
    """Yield the tokens of `generate`, each as a block of one that the host reads at once."""
    for step in generate(model, prompts, max_new_tokens, options, seeds, window):
        tokens = step.tokens[:, None]
        logprobs = step.logits.float().log_softmax(-1).gather(-1, tokens)  # (B, 1)
        yield Block(tokens.tolist(), logprobs.tolist(), 1, step.context)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Token ids (B, T), each row padded with zeros at its end, and the lengths of the rows."""
    lengths = [len(row) for row in rows]
    idx = torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in rows], device=device)
    return idx, lengths


def generate_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    options: SamplingOptions,
    seed: int,
    window: Window = "sliding",
) -> Iterator[int]:
    """Yield the token ids after one prompt, one at a time (see `generate`)."""
    for step in generate(model, [prompt], max_new_tokens, options, [seed], window):
        yield int(step.tokens)


def start_tokens(tokenizer: Tokenizer, prompt: str, begin: int | None = None) -> list[int]:
    """The token ids of a prompt. An empty prompt becomes a line break, or token 0 if a line break has no token.

    Args:
        begin: the token that each text began with in training on whole documents; None: another kind of training.

    Raises:
        TokenizerError: part of the prompt has no token.
    """
    if begin is not None:
        return [begin, *tokenizer.encode(prompt)]
    if ids := tokenizer.encode(prompt):
        return ids
    try:
        ids = tokenizer.encode("\n")
    except TokenizerError:
        return [0]
    return ids if tokenizer.decode(ids) == "\n" else [0]  # the line break may be encoded as an unknown token
