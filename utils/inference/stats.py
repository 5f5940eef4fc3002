"""The speed of generation, compared with the limit that reading from memory sets."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from model import LanguageModel
from utils.inference.decode import Block
from utils.inference.quantization import weight_bytes
from utils.machine.limits import measure_read

read_limit = functools.cache(measure_read)  # the measurement takes a second


@dataclass
class GenerationStats:
    """Totals over everything generated so far.

    prompt_tokens: tokens of the prompts that the model saw.
    prefill_seconds: time from the prompts to the first new tokens.
    steps: passes of the model after the prefill, each of one token for every sequence, or of several with a draft.
    decoded: tokens that these passes generated.
    decode_seconds: duration of these passes.
    attended: tokens in the caches, summed over steps and sequences.
    proposed, accepted: tokens that a draft proposed, and those of them that the model accepted.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    steps: int = 0
    decoded: int = 0
    decode_seconds: float = 0.0
    attended: int = 0
    proposed: int = 0
    accepted: int = 0

    def add_prefill(self, tokens: int, seconds: float) -> None:
        self.prompt_tokens += tokens
        self.prefill_seconds += seconds

    def add_block(self, block: Block, decoded: int, seconds: float) -> None:
        """Add a block; `decoded` of its tokens belong to sequences that had not ended."""
        self.steps += block.passes
        self.decoded += decoded
        self.attended += block.context
        self.proposed += block.proposed
        self.accepted += block.accepted
        self.decode_seconds += seconds

    def rows(self, model: LanguageModel, cached: bool = True) -> list[tuple[str, str]]:
        """(name, value in words) of each quantity.

        Args:
            cached: whether each step read the weights and the cache once, so that the bytes it read are known.
        """
        rows = [("prompt", f"{self.prompt_tokens:,} tokens")]
        if self.prefill_seconds:
            rate = self.prompt_tokens / self.prefill_seconds
            rows.append(("prefill", f"{rate:,.0f} tokens/s, {1000 * self.prefill_seconds:.1f} ms"))
        if self.decode_seconds:
            rows.append(("decode", f"{self.decoded / self.decode_seconds:,.1f} tokens/s, {self.decoded:,} tokens"))
        if self.proposed:
            each = f"{self.decoded / self.steps:.2f} tokens a pass"
            share = f"{self.accepted / self.proposed:.0%} of {self.proposed:,} proposed tokens accepted"
            rows.append(("draft", f"{share}, {each}"))
        if self.decode_seconds and cached and not self.proposed:  # what a draft model reads is not counted
            rate = self.bytes_read(model) / self.decode_seconds
            limit = read_limit(next(model.parameters()).device)
            share = f"{rate / limit:.0%} of the {limit / 1e9:.1f} GB/s that this machine reads"
            rows.append(("memory", f"{rate / 1e9:.2f} GB/s read by decoding, {share}"))
        return rows

    def bytes_read(self, model: LanguageModel) -> float:
        """The bytes read by decoding: the weights once a step, and the keys and values of the attended tokens."""
        config, itemsize = model.config, next(model.parameters()).element_size()
        per_token = 2 * config.n_layer * config.kv_heads * config.head_width * itemsize
        return self.steps * weight_bytes(model) + self.attended * per_token
