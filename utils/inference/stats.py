"""How fast text was generated, against the limit that memory sets."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from model import LanguageModel
from utils.inference.quantization import weight_bytes
from utils.machine.limits import measure_read

read_limit = functools.cache(measure_read)  # it takes a second


@dataclass
class GenerationStats:
    """What was generated so far, added up.

    prompt_tokens: that the model saw. prefill_seconds: from these to the first new token.
    steps: of decoding, each of one token of every sequence of a batch. decoded: tokens that came of them.
    attended: tokens in the caches, summed over the steps and their sequences.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    steps: int = 0
    decoded: int = 0
    decode_seconds: float = 0.0
    attended: int = 0

    def add_prefill(self, tokens: int, seconds: float) -> None:
        self.prompt_tokens += tokens
        self.prefill_seconds += seconds

    def add_step(self, decoded: int, attended: int, seconds: float) -> None:
        self.steps += 1
        self.decoded += decoded
        self.attended += attended
        self.decode_seconds += seconds

    def rows(self, model: LanguageModel, cached: bool = True) -> list[tuple[str, str]]:
        """What and how much, for people.

        Args:
            cached: each step read the weights and the cache once, so the bytes it read are known.
        """
        rows = [("prompt", f"{self.prompt_tokens:,} tokens")]
        if self.prefill_seconds:
            rate = self.prompt_tokens / self.prefill_seconds
            rows.append(("prefill", f"{rate:,.0f} tokens/s, {1000 * self.prefill_seconds:.1f} ms"))
        if self.decode_seconds:
            rows.append(("decode", f"{self.decoded / self.decode_seconds:,.1f} tokens/s, {self.decoded:,} tokens"))
        if self.decode_seconds and cached:
            rate = self.bytes_read(model) / self.decode_seconds
            limit = read_limit(next(model.parameters()).device)
            share = f"{rate / limit:.0%} of the {limit / 1e9:.1f} GB/s that this machine reads"
            rows.append(("memory", f"{rate / 1e9:.2f} GB/s read by decoding, {share}"))
        return rows

    def bytes_read(self, model: LanguageModel) -> float:
        """By decoding: the weights once a step, and the keys and values of what was attended to."""
        config, itemsize = model.config, next(model.parameters()).element_size()
        per_token = 2 * config.n_layer * config.kv_heads * config.head_width * itemsize
        return self.steps * weight_bytes(model) + self.attended * per_token
