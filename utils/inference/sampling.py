"""Drawing the next token: filters of its probabilities, and a random stream for each sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from utils.config.settings import InferenceConfig
from utils.errors import UserError

GREEDY_BELOW = 1e-6  # lower temperatures differ from greedy only in ties
HIGHEST_TEMPERATURE = 1e6
PENALTIES = (1e-3, 1e3)  # the range of repetition_penalty; beyond it, logits can overflow
SMALLEST = torch.finfo(torch.float32).tiny
AHEAD = 256  # random numbers that a stream draws at once


class SamplingError(UserError):
    """Sampling options out of bounds."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; the options act in this order.

    banned: token ids that are never drawn.
    repetition_penalty: for tokens that the text already has, positive logits are divided by it and negative ones
        multiplied [Keskar et al. 2019, CTRL].
    temperature: logits are divided by it; 0 is greedy.
    top_k: keep the k most likely tokens, and those that tie with the last of them.
    top_p: keep the smallest set of most likely tokens whose probabilities reach p [Holtzman et al. 2020].
    min_p: keep tokens at least min_p times as likely as the most likely one [Nguyen et al. 2024].

    Raises:
        SamplingError: a value is out of bounds.

    >>> greedy, careful = SamplingOptions(temperature=0), SamplingOptions(temperature=0.5, top_k=40)
    >>> Generator.from_run("baseline").generate("The ", Request(10, options=greedy)).finish
    'length'
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    banned: tuple[int, ...] = ()

    @classmethod
    def configured(cls, settings: InferenceConfig) -> Self:
        """The options that the settings of section `inference` give."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls) if field.name != "banned"})

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= HIGHEST_TEMPERATURE:
            raise SamplingError(
                f"temperature must be from 0 (greedy) to {HIGHEST_TEMPERATURE:,.0f}, not {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"top-k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SamplingError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise SamplingError(f"min-p must be from 0 to 1, not {self.min_p}")
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            raise SamplingError(
                f"repetition-penalty must be from {least:g} to {most:,.0f}, not {self.repetition_penalty}"
            )


class RandomStreams:
    """Uniform random numbers: one stream for each sequence, independent of the rest of its batch.

    They are drawn on the CPU, many at once, so that every device gets the same numbers. On MPS, which has no double
    precision, they stay on the CPU.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._next = AHEAD

    def draw_ahead(self) -> torch.Tensor:
        """Draw the numbers of the next AHEAD calls of `draw` at once: (AHEAD, B)."""
        rows = [torch.rand(AHEAD, dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.stack(rows, dim=1).to(self._device)

    def draw(self) -> torch.Tensor:
        """Draw one number in [0, 1) for each sequence: (B,), float64."""
        if self._next == AHEAD:
            self._numbers = self.draw_ahead().unbind()  # AHEAD of (B,)
            self._next = 0
        self._next += 1
        return self._numbers[self._next - 1]


@functools.lru_cache(maxsize=64)
def banned_index(banned: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The banned tokens on the device; copied there once, because a CUDA graph cannot contain a copy from the host."""
    return torch.tensor(banned, device=device)


def filter_logits(logits: torch.Tensor, options: SamplingOptions, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Apply the options to logits (B, V); tokens that must not be drawn get -inf.

    Args:
        seen: (B, V) bool, tokens that the text already has; needed with a repetition penalty.
    """
    logits = logits.float()
    if options.banned:
        logits = logits.index_fill(-1, banned_index(options.banned, logits.device), float("-inf"))
    if options.repetition_penalty != 1:
        assert seen is not None
        penalty = options.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.temperature < GREEDY_BELOW:
        return logits
    # Logits of at most 0 cannot overflow with a small temperature, which would give inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if options.top_k is not None and options.top_k < logits.size(-1):
        smallest_kept = logits.topk(options.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)  # (B, V)
        probabilities = ordered.softmax(-1)
        reached_before = probabilities.cumsum(-1) - probabilities >= max(options.top_p, SMALLEST)  # never the first
        logits = logits.masked_fill(torch.empty_like(reached_before).scatter_(-1, order, reached_before), float("-inf"))
    if options.min_p is not None:
        probabilities = logits.softmax(-1)
        least = options.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def sample(
    logits: torch.Tensor, options: SamplingOptions, uniform: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw one token for each row by inverting the cumulative distribution function.

    Args:
        logits: (B, V), as the model gives them.
        uniform: (B,) random numbers in [0, 1), float64.
        seen: see `filter_logits`.

    Returns:
        (B,) token ids, on the device of the logits.
    """
    filtered = filter_logits(logits, options, seen)
    if options.temperature < GREEDY_BELOW:
        return filtered.argmax(-1)
    # CUDA has no fast softmax in double precision, and its float32 is exact to a rounding of the last bit.
    exact = filtered if filtered.is_cuda else filtered.to(uniform.device).double()
    reached = exact.softmax(-1).double().cumsum(-1)  # (B, V)
    tokens = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
    return tokens.clamp_(max=logits.size(-1) - 1).to(logits.device)  # searchsorted gives V for NaN
