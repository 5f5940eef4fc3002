"""Several documents in a row: each has the loss and gradients that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import utils.nn.attention as attention
from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.nn.cross_entropy import ChunkedCrossEntropy, chunked_cross_entropy, plain_cross_entropy
from utils.nn.documents import DocumentMask
from utils.nn.targets import IGNORED

START, T, VOCAB = 3, 12, 20  # START is the token that begins a document
LENGTHS = [[5, 4, 2], [12], [3, 8], [1, 1, 9]]  # of the documents in each row; the rest is padding
KINDS: list[dict[str, Any]] = [
    {},
    {"position": "rope", "n_kv_head": 1, "qk_norm": True},
    {"position": "rope", "sliding_window": 2, "full_attention_layers": 1},
    {"ngram_rows": [31, 31], "mlp": "swiglu", "position": "rope"},
]


def model_of(kind: dict[str, Any], document_token: int | None = START) -> LanguageModel:
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": T, **kind}
    model = LanguageModel(ModelConfig.model_validate(settings), VOCAB).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.document_token = document_token
    return model


def documents() -> list[list[torch.Tensor]]:
    """The documents of each row, each (n + 1,); its last token is the first of the next document."""
    generator = torch.Generator().manual_seed(1)
    words = [[torch.randint(4, VOCAB, (n + 1,), generator=generator) for n in row] for row in LENGTHS]
    for document in (document for row in words for document in row):
        document[0] = document[-1] = START
    return words


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """All documents as one batch, padded with START, which has no target."""
    inputs, targets = torch.full((len(LENGTHS), T), START), torch.full((len(LENGTHS), T), IGNORED)
    for row, parts in enumerate(documents()):
        inputs[row, : sum(LENGTHS[row])] = torch.cat([part[:-1] for part in parts])
        targets[row, : sum(LENGTHS[row])] = torch.cat([part[1:] for part in parts])
    return inputs, targets


def gradients(model: LanguageModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_each_document_alone(
    kind: dict[str, Any], by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_products:
        monkeypatch.setattr(attention, "SHORT_TOKENS", 0)
    alone, model = model_of(kind, None), model_of(kind)
    total = torch.zeros(())
    for part in (part for row in documents() for part in row):
        total = total + alone.loss(part[None, :-1], part[None, 1:]) * (len(part) - 1)
    expected = total / sum(map(sum, LENGTHS))
    loss = model.loss(*rows())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(alone, expected))
    torch.testing.assert_close(model(*rows())[1], expected)


def test_short_attention_applies_the_mask_like_torch() -> None:
    mask = DocumentMask(rows()[0], START, torch.float32).mask
    q, k, v = (torch.randn(len(LENGTHS), T, 2, 8, requires_grad=True) for _ in range(3))
    found = attention.causal_attention(q, k, v, mask=mask)
    assert found.grad_fn is not None
    assert "ShortAttention" in type(found.grad_fn).__name__
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask)
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
    )


def test_a_row_that_begins_inside_a_document_counts_positions_from_its_own_start() -> None:
    idx = torch.tensor([[5, 6, START, 7, START, START]])
    found = DocumentMask(idx, START, torch.float32)
    assert found.positions.tolist() == [[0, 1, 0, 1, 0, 0]]
    seen = (found.mask[0, 0] == 0).long()
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_ignores_document_tokens(kind: dict[str, Any]) -> None:
    from utils.inference.decode import new_cache

    idx = rows()[0][:1, :5]
    plain, masked = model_of(kind, None).eval(), model_of(kind).eval()
    with torch.no_grad():
        expected, cache = plain(idx)[0], new_cache(masked, 1)
        for place in range(5):
            logits = masked(idx[:, place : place + 1], cache=cache)[0]
            torch.testing.assert_close(logits[:, 0], expected[:, place])


def test_the_chunked_loss_counts_only_targets() -> None:
    hidden = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(20, (24,))
    targets[[0, 5, 6, 7, 20]] = IGNORED
    plain = plain_cross_entropy(hidden.float() @ weight.float().t(), targets)
    chunked = chunked_cross_entropy(hidden, weight, targets, rows=4)
    torch.testing.assert_close(chunked.float(), plain)
    of_chunked = torch.autograd.grad(chunked, (hidden, weight))
    torch.testing.assert_close(of_chunked, torch.autograd.grad(plain, (hidden, weight)), rtol=1e-5, atol=1e-6)


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight = torch.randn(8, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = ChunkedCrossEntropy.apply(hidden, weight, torch.full((8,), IGNORED), 4, None, False)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))
