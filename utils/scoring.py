"""How well a model predicts a text that it did not see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import LanguageModel
from tokenizer import CharTokenizer
from utils.errors import UserError

WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class Score:
    """loss: nats per predicted token. tokens: predicted ones, all but the first. bytes: of the text in UTF-8."""

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes


@torch.no_grad()
def score(model: LanguageModel, tokenizer: CharTokenizer, text: str) -> Score:
    """The loss over a text, in windows of block_size that move on by half: each token counts once.

    So a token is predicted from at least half a context, but in the first window, and from less than a whole one.

    Args:
        model: in eval mode.

    Raises:
        TokenizerError: a character without a token.
        UserError: fewer than two tokens.
    """
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"a text of {len(ids)} tokens has nothing to predict: at least 2 are needed")
    assert not model.training
    device, T = next(model.parameters()).device, model.config.block_size
    tokens = torch.tensor(ids, device=device)
    stride = max(T // 2, 1)
    starts = range(0, max(len(ids) - 1 - (T - stride), 1), stride)
    total, counted = 0.0, 1  # the first token is predicted by nothing
    for first in range(0, len(starts), WINDOWS_AT_ONCE):
        windows = [tokens[start : start + T + 1] for start in starts[first : first + WINDOWS_AT_ONCE]]
        targets = torch.nn.utils.rnn.pad_sequence([window[1:] for window in windows], batch_first=True)  # (W, T)
        inputs = torch.nn.utils.rnn.pad_sequence([window[:-1] for window in windows], batch_first=True)
        logits = model(inputs)[0].float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        for row, (start, window) in enumerate(zip(starts[first:], windows, strict=False)):
            end = start + len(window)
            total += float(losses[row, counted - start - 1 : end - start - 1].double().sum())
            counted = end
    return Score(total / (len(ids) - 1), len(ids) - 1, len(text.encode()))
