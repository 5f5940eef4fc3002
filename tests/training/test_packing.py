"""Training on rows of documents: the loss of an update is the mean over its targets, however the batch is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import LanguageModel
from tests.small_dataset import write_dataset
from utils.inference.evaluation import BatchLoss, estimate_loss
from utils.nn.targets import IGNORED
from utils.training.batch_size import bytes_of_training
from utils.training.feed import Feed
from utils.training.state import TrainState
from utils.training.step import EagerUpdate, forward_backward, no_phase
from utils.training.step_graph import GraphUpdate

NewState = Callable[..., TrainState]


@pytest.fixture
def document_state(new_state: NewState, tmp_path: Path) -> NewState:
    """A state before its first step, on a prepared dataset of documents."""
    write_dataset(tmp_path / "datasets" / "small")
    places = ("--dataset", "small", "--datasets-dir", str(tmp_path / "datasets"))
    return lambda *words: new_state(*places, "--batch-size", "8", "--block-size", "32", "--seed", "1", *words)


def gradients(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_the_loss_does_not_depend_on_the_number_of_micro_steps(packing: str, document_state: NewState) -> None:
    found = []
    for micro_steps in (1, 2, 4):
        state = document_state("--packing", packing, "--gradient-accumulation-steps", str(micro_steps))
        shares = state.sampler.target_shares(0, micro_steps)
        assert shares is not None
        assert sum(shares) == pytest.approx(1)
        found.append((forward_backward(state), gradients(state)))
    assert len(set(shares)) > 1  # not a mean of means
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(grads, found[0][1])


def test_the_loss_is_that_of_each_document_alone(document_state: NewState) -> None:
    state = document_state("--packing", "none", "--gradient-accumulation-steps", "2")
    loss, grads = forward_backward(state), gradients(state)
    inputs, targets = (torch.from_numpy(part) for part in state.sampler.update(0))
    state.model.zero_grad()
    state.model.document_token = None
    counts = (targets != IGNORED).sum(1).tolist()
    assert min(counts) < max(counts) == state.config.model.block_size
    parts = zip(inputs, targets, counts, strict=True)
    losses = [state.model.loss(row[None, :n], target[None, :n]) * n for row, target, n in parts]
    alone = torch.stack(losses).sum() / sum(counts)
    torch.testing.assert_close(loss, alone.detach())
    alone.backward()
    torch.testing.assert_close(grads, gradients(state))


def test_a_micro_step_without_targets_does_not_count(document_state: NewState) -> None:
    state = document_state("--packing", "none", "--gradient-accumulation-steps", "2")
    _, targets = state.sampler.update(0)
    expected = document_state("--packing", "none").model.loss(
        *(torch.from_numpy(part[4:]) for part in state.sampler.update(0))
    )
    targets[:4] = IGNORED
    loss = forward_backward(state)
    torch.testing.assert_close(loss, expected.detach())
    assert all(torch.isfinite(grad).all() for grad in gradients(state).values())


@pytest.mark.parametrize("micro_steps", ["1", "2"])
def test_recorded_updates_equal_eager_ones(micro_steps: str, document_state: NewState) -> None:
    runs = []
    for make in (EagerUpdate, lambda state: GraphUpdate(state, lambda message: None)):
        state = document_state("--packing", "documents", "--gradient-accumulation-steps", micro_steps)
        update, losses = make(state), []
        for _ in range(5):
            loss, norms = update.gradients(no_phase)
            update.apply(norms)
            losses.append(loss.item())
        runs.append((losses, [parameter.tolist() for parameter in state.model.parameters()]))
    assert runs[0] == runs[1]


def test_a_feed_yields_the_batches_and_shares_of_the_sampler(document_state: NewState) -> None:
    sampler = document_state("--packing", "documents").sampler
    batches = Feed(sampler, micro_steps=2)
    for update in (0, 1, 2, 7, 3):
        batches.load(update)
        for micro_step in range(2):
            expected = (*sampler.train_batch(update, micro_step, 2), sampler.target_share(update, micro_step, 2))
            found = (*batches.batch(micro_step), batches.target_share(micro_step))
            for own, other in zip(found, expected, strict=True):
                assert own is not None
                assert other is not None
                assert torch.equal(own, other)


@pytest.mark.parametrize("packing", ["none", "documents", "random"])
def test_an_evaluation_is_the_mean_over_its_targets(packing: str, document_state: NewState) -> None:
    state = document_state("--packing", packing)
    loss = BatchLoss(state.model, torch.no_grad)
    found = [estimate_loss(loss, state.sampler, 50, micro_steps)["val/loss"] for micro_steps in (1, 4)]
    total = count = 0.0
    state.model.eval()
    for inputs, targets in state.sampler.evaluation_batches("val", 50):
        number = int((targets != IGNORED).sum())
        total += state.model.loss(inputs, targets).item() * number
        count += number
    assert found == pytest.approx([total / count] * 2)


def test_the_memory_estimate_includes_the_document_mask(
    document_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:

    seen: list[int | None] = []
    own = LanguageModel.hidden

    def hidden(self: LanguageModel, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(self.document_token)
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(LanguageModel, "hidden", hidden)
    state = document_state("--packing", "documents")
    assert bytes_of_training(state.config, state.corpus, torch.float32, 4) > 0
    assert set(seen) == {0}
