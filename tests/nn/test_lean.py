"""A lean module: the same numbers from the same tensors."""

from __future__ import annotations

import pytest
import torch

from model import LanguageModel
from tests.test_model import config_of, every_variant, lively_model, random_tokens
from utils.inference.quantization import with_weights
from utils.nn.lean import lean


@every_variant
@torch.no_grad()
def test_the_logits_are_those_of_the_model(variant: str) -> None:
    model, idx = lively_model(config_of(variant)), random_tokens(3, 9)
    assert torch.equal(lean(model)(idx)[0], model(idx)[0])
    int8 = with_weights(model, "int8")
    assert torch.equal(lean(int8)(idx)[0], int8(idx)[0])


def test_weights_are_shared_and_changes_in_place_are_seen() -> None:
    model, idx = lively_model(config_of("gpt2")), random_tokens(1, 9)
    plain = lean(model)
    with torch.no_grad():
        before = plain(idx)[0]
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(plain(idx)[0], before)
        assert torch.equal(plain(idx)[0], model(idx)[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_that_of_the_mode_that_the_model_is_in(training: bool) -> None:
    model = LanguageModel(config_of("gpt2", dropout=0.5), 17).train(training)
    plain, idx = lean(model), random_tokens(1, 9)
    torch.manual_seed(5)
    expected = model(idx)[0]
    torch.manual_seed(5)
    assert torch.equal(plain(idx)[0], expected)
    assert torch.equal(expected, model.eval()(idx)[0]) is not training


@every_variant
def test_gradients_are_those_of_the_model(variant: str) -> None:
    model, idx = lively_model(config_of(variant)).train(), random_tokens(3, 9)
    expected, found = (
        torch.autograd.grad(forward(idx, idx)[1], list(model.parameters())) for forward in (model, lean(model))
    )
    assert all(map(torch.equal, found, expected))


def test_a_module_with_hooks_in_it_stays_as_it_is() -> None:
    model, shapes = LanguageModel(config_of("gpt2"), 17), []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    lean(model)(random_tokens(1, 9))
    assert shapes == [(1, 9, 16)]
    handle.remove()
    assert lean(model) is not model
