"""Losses of a model: the estimate on fixed batches and the exact loss of a split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

import utils.inference.graphs as graphs
from benchmarks.common import split_loss
from data import BatchSampler, Corpus, sample_offsets
from model import LanguageModel
from tests.tiny_export import char_tokenizer, lively
from utils.config.settings import ModelConfig
from utils.inference.evaluation import BatchLoss, EvaluationStoppedError, estimate_loss, evaluating
from utils.inference.graphs import Graphs

VOCAB, BLOCK = 13, 8


@pytest.fixture
def model() -> LanguageModel:
    """A model with dropout, so that its loss in training mode would differ."""
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, dropout=0.3)
    return lively(LanguageModel(config, VOCAB)).train()


@pytest.fixture
def sampler() -> BatchSampler:
    tokens = np.random.default_rng(0).integers(VOCAB, size=300).astype(np.uint16)
    corpus = Corpus("random", "", char_tokenizer("abcdefghijklm"), tokens, 200)
    return BatchSampler(corpus, BLOCK, batch_size=5, seed=3, device=torch.device("cpu"))


def window_loss(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    """The losses (T,) of one window of T + 1 tokens, in eval mode."""
    was_training = model.training
    model.eval()
    ids = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1])[0][0].double()
    model.train(was_training)
    return logits.logsumexp(-1) - logits[torch.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("eval_iters", [1, 4])
def test_the_estimate_is_the_mean_over_the_fixed_windows(
    model: LanguageModel, sampler: BatchSampler, eval_iters: int
) -> None:
    losses = estimate_loss(BatchLoss(model, contextlib.nullcontext), sampler, eval_iters, 1)
    tokens = sampler.corpus.tokens
    expected = {}
    for name, stream, split in (("train/eval_loss", "train_eval", tokens[:200]), ("val/loss", "val", tokens[200:])):
        count = min(5 * eval_iters, len(split) // BLOCK - 1)  # once at most
        offsets = sample_offsets(0, stream, 0, count, len(split), BLOCK)
        windows = [window_loss(model, split[start : start + BLOCK + 1]) for start in offsets]
        expected[name] = torch.cat(windows).mean().item()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses["val/loss"] != pytest.approx(losses["train/eval_loss"], rel=1e-4)


def test_the_estimate_can_be_stopped_between_batches(model: LanguageModel, sampler: BatchSampler) -> None:
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> bool:
        seen.append((done, total))
        return len(seen) < 3

    with pytest.raises(EvaluationStoppedError):
        estimate_loss(BatchLoss(model, contextlib.nullcontext), sampler, 2, 1, watch)
    assert seen == [(0, 20), (5, 20), (10, 20)]


@pytest.mark.parametrize("training", [True, False])
def test_the_estimate_does_not_change_mode_gradients_and_random_state(
    model: LanguageModel, sampler: BatchSampler, training: bool
) -> None:
    model.train(training)
    before = torch.get_rng_state()
    estimate_loss(BatchLoss(model, contextlib.nullcontext), sampler, 2, 1)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_estimate_is_the_same_every_time(model: LanguageModel, sampler: BatchSampler) -> None:
    first, second = (estimate_loss(BatchLoss(model, contextlib.nullcontext), sampler, 2, 1) for _ in range(2))
    assert first == second


def test_the_estimate_runs_in_the_requested_precision(model: LanguageModel, sampler: BatchSampler) -> None:
    full = estimate_loss(BatchLoss(model, contextlib.nullcontext), sampler, 2, 1)
    half = estimate_loss(BatchLoss(model, lambda: torch.autocast("cpu", torch.bfloat16)), sampler, 2, 1)
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


def test_a_recorded_loss_equals_the_eager_one(
    model: LanguageModel, sampler: BatchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, recorded = BatchLoss(model, contextlib.nullcontext), BatchLoss(model, contextlib.nullcontext)
    monkeypatch.setattr(recorded, "_graphs", Graphs(torch.device("cpu")))
    for micro_steps in (1, 5, 1):  # batches of different shapes
        expected = estimate_loss(plain, sampler, 3, micro_steps)
        assert estimate_loss(recorded, sampler, 3, micro_steps) == expected
    with torch.no_grad():
        model.token_embedding.weight.mul_(2)
    assert estimate_loss(recorded, sampler, 3, 1) == estimate_loss(plain, sampler, 3, 1) != expected


def test_a_loss_is_recorded_again_after_weights_were_replaced(
    model: LanguageModel, sampler: BatchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture_graph(work: Callable[[], None], _device: torch.device) -> Callable[[], None]:
        """Like a CUDA graph, read the memory in which the weights were during the capture."""
        memory = [weight.data for weight in model.parameters()]

        def repeat() -> None:
            now = [weight.data for weight in model.parameters()]
            for weight, data in zip(model.parameters(), memory, strict=True):
                weight.data = data
            work()
            for weight, data in zip(model.parameters(), now, strict=True):
                weight.data = data

        return repeat

    monkeypatch.setattr(graphs, "capture_graph", capture_graph)
    plain, recorded = BatchLoss(model, contextlib.nullcontext), BatchLoss(model, contextlib.nullcontext)
    monkeypatch.setattr(recorded, "_graphs", Graphs(torch.device("cpu")))
    before = [estimate_loss(recorded, sampler, 3, 1) for _ in range(3)]
    for weight in model.parameters():
        weight.data = weight.data / 2
    after = [estimate_loss(recorded, sampler, 3, 1) for _ in range(3)]
    assert after == [estimate_loss(plain, sampler, 3, 1)] * 3
    assert after != before


def test_evaluating_restores_the_mode_after_an_exception(model: LanguageModel) -> None:
    def fail() -> None:
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("length", [2, 5, 9, 10, 17, 50, 81])  # 9, 17, 81: no partial window
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_split_loss_is_the_mean_over_adjacent_windows(model: LanguageModel, length: int, batch_size: int) -> None:
    tokens = np.random.default_rng(length).integers(VOCAB, size=length).astype(np.uint16)
    windows = [tokens[start : start + BLOCK + 1] for start in range(0, length - 1, BLOCK)]
    losses = torch.cat([window_loss(model, window) for window in windows])
    assert len(losses) == length - 1
    assert split_loss(model, tokens, batch_size) == pytest.approx(losses.mean().item(), rel=1e-5)
    assert model.training
