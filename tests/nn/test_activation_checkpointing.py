"""Activation checkpointing gives the same bits, and keeps fewer activations for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import LanguageModel
from utils.config.settings import ModelConfig

IDX = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
SETTINGS = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16}


def loss_and_gradients(*, checkpointing: bool, compiled: bool = False, **settings: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.model_validate({**SETTINGS, **settings}), vocab_size=50)
    model.recomputes = checkpointing
    function = torch.compile(model.loss, backend="aot_eager") if compiled else model.loss
    loss = function(IDX[:, :-1], IDX[:, 1:])
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None), torch.rand(3)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_loss_gradients_and_random_state_are_the_same_bits(dropout: float, position: str) -> None:
    ours = loss_and_gradients(checkpointing=True, dropout=dropout, position=position)
    theirs = loss_and_gradients(checkpointing=False, dropout=dropout, position=position)
    assert len(ours) == len(theirs)
    assert all(torch.equal(mine, reference) for mine, reference in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_activation_checkpointing_can_be_compiled() -> None:
    torch.testing.assert_close(
        loss_and_gradients(checkpointing=True, compiled=True), loss_and_gradients(checkpointing=False)
    )


def kept(model: LanguageModel) -> int:
    """The number of elements that the forward pass keeps for the backward pass, not counting parameters."""
    tensors: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            tensors[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(IDX[:, :-1], IDX[:, 1:])
    loss.backward()
    return sum(tensors.values())


def test_fewer_activations_are_kept_and_nothing_changes_without_gradients() -> None:
    model = LanguageModel(ModelConfig.model_validate(SETTINGS), vocab_size=50)
    names, before = list(model.state_dict()), kept(model)
    with torch.no_grad():
        expected = model.loss(IDX[:, :-1], IDX[:, 1:])
    model.recomputes = True
    assert list(model.state_dict()) == names
    assert kept(model) < before / 2
    with torch.no_grad():
        assert torch.equal(model.loss(IDX[:, :-1], IDX[:, 1:]), expected)
