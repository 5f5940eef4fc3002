"""Lean models, plain objects in place of modules, compute the same numbers from the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import MLP, LanguageModel
from tests.test_model import config_of, every_variant, lively_model, random_tokens
from utils.inference.quantization import with_weights
from utils.nn.lean import lean


@every_variant
@torch.no_grad()
def test_the_logits_equal_those_of_the_model(variant: str) -> None:
    model, idx = lively_model(config_of(variant)), random_tokens(3, 9)
    assert torch.equal(lean(model)(idx)[0], model(idx)[0])
    int8 = with_weights(model, "int8")
    assert torch.equal(lean(int8)(idx)[0], int8(idx)[0])


def test_weights_are_shared_so_changes_in_place_are_seen() -> None:
    model, idx = lively_model(config_of("gpt2")), random_tokens(1, 9)
    plain = lean(model)
    with torch.no_grad():
        before = plain(idx)[0]
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(plain(idx)[0], before)
        assert torch.equal(plain(idx)[0], model(idx)[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_follows_the_mode_of_the_model(training: bool) -> None:
    model = LanguageModel(config_of("gpt2", dropout=0.5), 17).train(training)
    plain, idx = lean(model), random_tokens(1, 9)
    torch.manual_seed(5)
    expected = model(idx)[0]
    torch.manual_seed(5)
    assert torch.equal(plain(idx)[0], expected)
    assert torch.equal(expected, model.eval()(idx)[0]) is not training


@every_variant
def test_the_gradients_equal_those_of_the_model(variant: str) -> None:
    model, idx = lively_model(config_of(variant)).train(), random_tokens(3, 9)
    expected, found = (
        torch.autograd.grad(forward(idx, idx)[1], list(model.parameters())) for forward in (model, lean(model))
    )
    assert all(map(torch.equal, found, expected))


@every_variant
def test_no_module_is_left_in_a_lean_model(variant: str) -> None:
    def modules_in(value: object) -> list[nn.Module]:
        if isinstance(value, nn.Module):
            return [value]
        parts = value if isinstance(value, list) else [v for k, v in vars(value).items() if k != "_modules"]
        return [
            found for part in parts if isinstance(part, list) or hasattr(part, "__dict__") for found in modules_in(part)
        ]

    for model in (lively_model(config_of(variant)), with_weights(lively_model(config_of(variant)), "int8")):
        assert modules_in(lean(model)) == []


def test_a_part_with_a_hook_stays_a_module() -> None:
    model, shapes = LanguageModel(config_of("gpt2"), 17), []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    plain = lean(model)
    plain(random_tokens(1, 9))
    assert shapes == [(1, 9, 16)]
    assert plain.blocks[0].mlp is model.blocks[0].mlp
    assert plain.blocks[1].mlp is not model.blocks[1].mlp
    handle.remove()
    assert lean(model).blocks[0].mlp is not model.blocks[0].mlp


def test_a_part_whose_forward_was_replaced_stays_a_module() -> None:
    model, idx = lively_model(config_of("gpt2")), random_tokens(1, 9)
    model.blocks[0].mlp.forward = torch.zeros_like
    assert lean(model).blocks[0].mlp is model.blocks[0].mlp
    assert torch.equal(lean(model)(idx)[0], model(idx)[0])


class Louder(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "other",
    [Louder(config_of("gpt2")), nn.Sequential(nn.Linear(16, 3), nn.Dropout(0.5), nn.Linear(3, 16)), nn.Linear(16, 16)],
    ids=lambda other: type(other).__name__,
)
def test_a_part_of_an_unknown_class_stays_a_module(other: nn.Module) -> None:
    model, idx = lively_model(config_of("gpt2")), random_tokens(1, 9)
    model.blocks[1].mlp = other.eval()
    assert lean(model).blocks[1].mlp is other
    assert torch.equal(lean(model)(idx)[0], model(idx)[0])


def test_a_subclass_of_the_model_is_returned_unchanged() -> None:
    class Mine(LanguageModel):
        pass

    model = Mine(config_of("gpt2"), 17)
    assert lean(model) is model
