"""The score of a text: each token is scored once, with the context of its window."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from model import LanguageModel
from tests.tiny_export import char_tokenizer, lively
from tokenizer import Tokenizer, TokenizerError
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.inference import scoring
from utils.inference.quantization import Weights, with_weights
from utils.inference.scoring import Score, perplexity, score, score_report

TOKENIZER = char_tokenizer("abcdefgü😀\n")
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1},
    "ngrams": {"ngram_rows": (31, 37), "logit_softcap": 5.0, "tie_embeddings": False},
}


def make_model(variant: str, block_size: int, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """Weights large enough that the probability of a token depends on the whole context."""
    torch.manual_seed(0)
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": block_size}
    return lively(LanguageModel(ModelConfig(**tiny | VARIANTS[variant]), (tokenizer or TOKENIZER).vocab_size))


def random_text(length: int) -> str:
    ids = torch.randint(TOKENIZER.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    return TOKENIZER.decode(ids.tolist())


@torch.no_grad()
def loss_by_hand(model: LanguageModel, text: str) -> float:
    """The mean loss, computed token by token from the preceding tokens of its window."""
    ids, T = TOKENIZER.encode(text), model.config.block_size
    half = max(T // 2, 1)
    losses = []
    for place in range(1, len(ids)):
        start = 0
        while place > start + T:  # the first window that reaches the token
            start += half
        logits = model(torch.tensor([ids[start:place]]))[0][0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    return sum(losses) / len(losses)


def shown(part: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 8])
def test_the_loss_is_the_mean_over_tokens_given_their_window(variant: str, block_size: int) -> None:
    model = make_model(variant, block_size)
    for length in (2, 3, block_size, block_size + 1, block_size + 2, 3 * block_size, 37):
        if length >= 2:
            found = score(model, TOKENIZER, text := random_text(length))
            assert found.loss == pytest.approx(loss_by_hand(model, text), abs=1e-5), length
            assert found.tokens == length - 1


@pytest.mark.parametrize("tokens_at_once", [1, 16, 24])
def test_the_number_of_windows_per_pass_changes_nothing(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_model("rope", 8), random_text(83)
    at_once = score(model, TOKENIZER, text)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens_at_once)
    assert score(model, TOKENIZER, text).loss == pytest.approx(at_once.loss, abs=1e-6)


def test_a_uniform_model_needs_log2_of_its_vocabulary_in_bits() -> None:
    model = make_model("learned", 8)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # also the head
    found = score(model, TOKENIZER, "abcdefg" * 5)
    assert found.perplexity == pytest.approx(TOKENIZER.vocab_size)
    assert found.bits_per_byte == pytest.approx(math.log2(TOKENIZER.vocab_size))


def test_bytes_are_counted_for_the_predicted_characters() -> None:
    assert score(make_model("learned", 8), TOKENIZER, "😀aü").bytes == 3
    unknown = char_tokenizer(TOKENIZER.decode(range(TOKENIZER.vocab_size)), unknown_token="\ufffd")
    assert score(make_model("learned", 8, unknown), unknown, "éaü").bytes == 3
    found = Score(loss=math.log(2), tokens=2, bytes=3, seconds=1.0)
    assert found.bits_per_byte == pytest.approx(2 / 3)


def test_a_loss_too_large_for_exp_has_an_infinite_perplexity() -> None:
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_smaller_weights_give_nearly_the_same_score(weights: Weights, tolerance: float) -> None:
    model, text = make_model("rope", 16), random_text(200)
    reference, small = score(model, TOKENIZER, text), score(with_weights(model, weights), TOKENIZER, text)
    assert small.loss == pytest.approx(reference.loss, abs=tolerance)
    assert small.loss != reference.loss


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_anything_to_predict_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"a text of {len(text)} tokens has nothing to predict: expected at least 2"):
        score(make_model("learned", 8), TOKENIZER, text)


def test_an_unknown_character_is_refused_with_its_position() -> None:
    with pytest.raises(TokenizerError, match=r"'x'.* at position 2 "):
        score(make_model("learned", 8), TOKENIZER, "abx")


def test_the_report_of_one_score_has_a_line_for_each_number() -> None:
    report = shown(score_report("some.txt", [("float32", Score(math.log(4), 1200, 1300, 2.5))]))
    assert [line.split() for line in report.splitlines()] == [
        ["text", "some.txt"],
        ["weights", "float32"],
        ["loss", "1.3863"],
        ["perplexity", "4.0000"],
        ["bits", "per", "byte", "1.8462"],
        ["tokens", "1,200"],
        ["time", "2.50", "s"],
    ]


def test_the_report_of_smaller_weights_shows_the_differences() -> None:
    scores = [("float32", Score(math.log(4), 1200, 1300, 2.0)), ("int8", Score(math.log(4.02), 1200, 1300, 1.0))]
    report = shown(score_report("some.txt", scores))
    assert "int8 - float32" in report
    rows = {line.split("  ")[0]: line.split()[1:] for line in report.splitlines()}
    assert rows["perplexity"] == ["4.0000", "4.0200", "+0.0200", "(+0.50%)"]
    assert rows["loss"] == ["1.3863", "1.3913", "+0.0050"]
    assert rows["time"] == ["2.00", "s", "1.00", "s"]
