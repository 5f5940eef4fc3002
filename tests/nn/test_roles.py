"""Roles of parameters, declared by layers, which decide initialisation and parameter groups."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from model import LanguageModel, init_weights
from tests.test_model import config_of, every_variant
from utils.config.settings import OptimizerConfig
from utils.nn.linear import Linear
from utils.nn.roles import BIAS, EMBEDDING, HEAD, MATRIX, RESIDUAL, declare, declared_roles
from utils.optim.groups import parameter_groups


@every_variant
def test_every_parameter_of_our_layers_has_a_role(variant: str) -> None:
    model = LanguageModel(config_of(variant), 11)
    assert set(declared_roles(model)) == set(model.parameters())


def test_a_linear_layer_is_a_matrix_with_a_bias_unless_declared_otherwise() -> None:
    layer = Linear(3, 2)
    assert declared_roles(layer) == {layer.weight: MATRIX, layer.bias: BIAS}
    assert declare(layer, weight=RESIDUAL) is layer
    assert declared_roles(layer) == {layer.weight: RESIDUAL, layer.bias: BIAS}


def test_a_missing_bias_has_no_role() -> None:
    layer = Linear(3, 2, bias=False)
    assert declared_roles(layer) == {layer.weight: MATRIX}


def test_a_parameter_that_a_module_does_not_have_cannot_be_declared() -> None:
    with pytest.raises(AssertionError, match="Embedding has no such parameter"):
        declare(nn.Embedding(3, 2), bias=BIAS)


def test_a_shared_parameter_has_the_role_that_is_declared_first() -> None:
    table = declare(nn.Embedding(3, 2), weight=EMBEDDING)
    head = declare(Linear(2, 3, bias=False), weight=HEAD)
    head.weight = table.weight
    assert declared_roles(nn.Sequential(table, head)) == {table.weight: EMBEDDING}


def test_a_copy_of_a_layer_keeps_its_roles() -> None:
    layer = declare(Linear(3, 2), weight=RESIDUAL)
    other = copy.deepcopy(layer)
    declare(layer, weight=HEAD)
    assert list(declared_roles(other).values()) == [RESIDUAL, BIAS]
    assert declared_roles(nn.Linear(3, 2)) == {}


def test_parameters_with_a_role_are_initialised_once_and_others_keep_their_own_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel(config_of("gpt2"), 11)
    model.extra = nn.ParameterList([torch.full((2, 3), 7.0), torch.full((4,), 8.0)])
    model.blocks[0].mlp.up = nn.Linear(16, 64)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    own = {"blocks.0.mlp.up.weight", "blocks.0.mlp.up.bias", "extra.0", "extra.1"}
    initialised: list[torch.Tensor] = []
    for kind in ("normal_", "zeros_", "ones_"):
        original = getattr(nn.init, kind)
        monkeypatch.setattr(nn.init, kind, lambda p, f=original, **kw: initialised.append(p) or f(p, **kw))
    init_weights(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[parameter] for parameter in initialised) == sorted(before.keys() - own)
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in own)


def test_parameters_without_a_role_are_grouped_by_their_shape() -> None:
    model = LanguageModel(config_of("untied"), 11)
    model.embedding_like_name = nn.Linear(5, 4)
    model.head_norm = nn.ParameterList([torch.zeros(2, 3, 4), torch.zeros(())])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {g["name"]: [names[p] for p in g["params"]] for g in parameter_groups(model, OptimizerConfig())}
    assert groups["embeddings"] == ["token_embedding.weight", "position_embedding.weight"]
    assert groups["head"] == ["head.weight"]
    assert groups["matrices"][-2:] == ["embedding_like_name.weight", "head_norm.0"]
    assert groups["vectors"][-2:] == ["embedding_like_name.bias", "head_norm.1"]
    assert sorted(itertools.chain(*groups.values())) == sorted(names.values())


def test_rows_that_do_not_add_up_are_refused() -> None:
    layer = declare(Linear(3, 6), weight=MATRIX.stacked(2, 2))
    with pytest.raises(AssertionError, match=r"\[2, 2\] rows are declared of a matrix that has 6"):
        parameter_groups(layer, OptimizerConfig())
