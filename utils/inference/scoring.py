"""How well a model predicts a text that it did not see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Group, RenderableType
from rich.text import Text
from torch.nn.utils.rnn import pad_sequence

from model import LanguageModel
from tokenizer import Tokenizer
from utils.errors import UserError
from utils.packing.joined import Joined
from utils.terminal.tables import plain_table
from utils.terminal.words import duration, fact_lines

TOKENS_AT_ONCE = 2048  # in one pass through the model
TOKENS_AT_ONCE_GPU = 1 << 16
LOGITS_AT_ONCE = 1 << 27  # 2,670 tokens with GPT-2's vocabulary
NOT_COUNTED = -1  # a target without a loss


@dataclass(frozen=True)
class Score:
    """How well a text is predicted.

    loss: nats per predicted token.
    tokens: number of predicted tokens, all but the first.
    bytes: size of the predicted text in UTF-8.
    seconds: duration of the passes.
    """

    loss: float
    tokens: int
    bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def facts(self) -> dict[str, float]:
        """All fields and derived quantities by name."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which is comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token: the number of equally likely tokens with the same loss."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def score(model: LanguageModel, tokenizer: Tokenizer, text: str, begin: int | None = None) -> Score:
    """Compute the loss over a text, counting each token once, in the windows of `token_losses`.

    Args:
        model: in eval mode.
        begin: the token that each text began with in training, if any.

    Raises:
        TokenizerError: part of the text has no token.
        UserError: fewer than two tokens.
    """
    return score_tokens(model, *text_tokens(tokenizer, text, begin))


def score_tokens(
    model: LanguageModel,
    ids: np.ndarray | Joined,
    n_bytes: int,
    stride: int | None = None,
    watch: Callable[[int, np.ndarray], None] = lambda first, losses: None,
) -> Score:
    """Compute the loss over token ids (n,), of any integer type; they may be memory-mapped.

    Args:
        model: in eval mode.
        n_bytes: the size in UTF-8 of the text of all tokens but the first.
        stride: see `token_losses`.
        watch: called after each pass with the position of its first token in `ids` and the losses of its tokens.

    Raises:
        UserError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError(f"a text of {len(ids)} tokens has nothing to predict: expected at least 2")
    began, total, place = time.perf_counter(), 0.0, 1
    for losses in token_losses(model, ids, stride):
        total += float(losses.sum())
        watch(place, losses)
        place += len(losses)
    return Score(total / (len(ids) - 1), len(ids) - 1, n_bytes, time.perf_counter() - began)


def token_losses(model: LanguageModel, ids: np.ndarray | Joined, stride: int | None = None) -> Iterator[np.ndarray]:
    """Yield the loss of each token but the first, in order: nats, float64, in parts (n,) on the host.

    Windows of block_size tokens advance by `stride`. In the first window every token counts; in each later one only
    the last `stride` tokens count, so that they attend to at least the other block_size - stride tokens of the window.

    Args:
        model: in eval mode.
        ids: (n,), at least two.
        stride: 1 to block_size; None: half of block_size. A smaller one gives each token more context, in more passes.
    """
    assert not model.training
    device, T = next(model.parameters()).device, model.config.block_size
    stride = stride or max(T // 2, 1)
    older = T - stride  # tokens of a window that the previous one has counted
    starts = range(0, max(len(ids) - 1 - older, 1), stride)
    at_once = max(tokens_at_once(device, model.vocab_size) // T, 1)
    for first in range(0, len(starts), at_once):
        begin, end = starts[first], starts[min(first + at_once, len(starts)) - 1] + T + 1
        tokens = torch.from_numpy(np.array(ids[begin:end], dtype=np.int64)).to(device)
        part = [tokens[start - begin : start - begin + T + 1] for start in starts[first : first + at_once]]
        inputs = pad_sequence([window[:-1] for window in part], batch_first=True)  # (W, T)
        targets = pad_sequence([window[1:] for window in part], batch_first=True, padding_value=NOT_COUNTED)  # (W, T)
        targets[int(first == 0) :, :older] = NOT_COUNTED
        counted = targets != NOT_COUNTED
        with torch.no_grad():
            logits = model.head_logits(model.hidden(inputs)[counted])  # (n, V)
            losses = F.cross_entropy(logits.float(), targets[counted], reduction="none")
        yield losses.cpu().double().numpy()


def tokens_at_once(device: torch.device, vocab_size: int) -> int:
    """The number of tokens in one pass: enough to keep the processor busy, with at most 0.5 GB of logits."""
    most = TOKENS_AT_ONCE if device.type == "cpu" else TOKENS_AT_ONCE_GPU
    return min(most, LOGITS_AT_ONCE // vocab_size)


def text_tokens(tokenizer: Tokenizer, text: str, begin: int | None = None) -> tuple[np.ndarray, int]:
    """Token ids (n,) of a text, in a narrow type, and the size in bytes of all tokens but the first.

    Args:
        begin: a token put before the text; None: the first token of the text itself is not predicted.

    Raises:
        TokenizerError: part of the text has no token.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    before = np.array([] if begin is None else [begin], dtype)
    ids = np.concatenate([before, *(part.astype(dtype) for part in tokenizer.encode_parts(text))])
    of_first = _first_bytes(tokenizer, int(ids[0]), text) if begin is None and len(ids) else 0
    return ids, len(text.encode()) - of_first


def _first_bytes(tokenizer: Tokenizer, token: int, text: str) -> int:
    """The bytes of `text` in its first token, which may end within a character, or stand for an unknown one."""
    piece = tokenizer.decode_bytes([token])
    if text.encode().startswith(piece):
        return len(piece)
    return len(text[: len(tokenizer.decode([token]))].encode())


def score_report(name: str, scores: Sequence[tuple[str, Score]]) -> RenderableType:
    """Show the scores of a text.

    Args:
        name: name of the text.
        scores: (weights, score). The first is the reference; each further one also gets a column of differences.
    """
    (weights, first), *others = scores
    if not others:
        return fact_lines([("text", name), ("weights", weights), *zip(QUANTITIES, _words(first), strict=True)])
    headers = [*(header for header, _ in scores), *(f"{header} - {weights}" for header, _ in others)]
    table = plain_table([""], headers)
    differences = [_differences(first, other) for _, other in others]
    columns = [*(_words(score) for _, score in scores), *differences]
    for quantity, *cells in zip(QUANTITIES, *columns, strict=True):
        table.add_row(Text(quantity, style="cyan"), *cells)
    return Group(fact_lines([("text", name)]), table)


QUANTITIES = ("loss", "perplexity", "bits per byte", "tokens", "time")


def _words(score: Score) -> list[str]:
    """The QUANTITIES of a score as text."""
    return [
        f"{score.loss:.4f}",
        f"{score.perplexity:.4f}",
        f"{score.bits_per_byte:.4f}",
        f"{score.tokens:,}",
        f"{score.seconds:.2f} s" if score.seconds < 60 else duration(score.seconds),
    ]


def _differences(reference: Score, other: Score) -> list[str]:
    relative = other.perplexity / reference.perplexity - 1
    return [
        f"{other.loss - reference.loss:+.4f}",
        f"{other.perplexity - reference.perplexity:+.4f} ({relative:+.2%})",
        f"{other.bits_per_byte - reference.bits_per_byte:+.4f}",
        "",
        "",
    ]
