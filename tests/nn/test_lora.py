"""Adapters: at first the model equals its base, only adapters are trained, and merged weights give the same logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import LanguageModel
from utils.config.settings import ModelConfig, OptimizerConfig
from utils.errors import UserError
from utils.nn import linear
from utils.nn.costs import training_flops
from utils.nn.float8 import float8_linear, use_float8
from utils.nn.lean import lean
from utils.nn.lora import (
    LoraLinear,
    adapted_layers,
    adapter_settings,
    add_adapters,
    count_parameters,
    frozen_weights,
    merged_weights,
)
from utils.optim.groups import build_optimizer, parameter_groups

GPT2: dict[str, Any] = {"mlp": "gelu_tanh"}
LLAMA: dict[str, Any] = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm", "bias": False, "n_kv_head": 2}
SHAPES = pytest.mark.parametrize("shape", [GPT2, {**LLAMA, "tie_embeddings": False}], ids=["gpt2", "llama"])


def adapted(shape: dict[str, Any], trained: bool = False, **settings: Any) -> LanguageModel:
    """A small model with adapters; their B matrices are zero unless `trained`."""
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, **shape)
    model = LanguageModel(config, 50)
    add_adapters(model, config, OptimizerConfig(lora_rank=3, **settings))
    for layer in adapted_layers(model).values() if trained else ():
        torch.nn.init.normal_(layer.lora_b, std=0.3)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))


@SHAPES
def test_at_first_the_model_equals_its_base(shape: dict[str, Any]) -> None:
    model, idx = adapted(shape, lora_dropout=0.5), tokens()
    base = LanguageModel(model.config, 50)
    base.load_state_dict({name: weight for name, weight in model.state_dict().items() if "lora" not in name})
    assert torch.equal(model.train()(idx)[0], base(idx)[0])


@SHAPES
def test_only_adapters_have_gradients_and_are_in_the_optimizer(shape: dict[str, Any]) -> None:
    model, idx = adapted(shape, trained=True), tokens()
    model.loss(idx, idx).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, _ in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))]
    (group,) = build_optimizer(model, OptimizerConfig(lora_rank=3)).param_groups
    assert (group["name"], len(group["params"])) == ("matrices", len(trained))
    counts = count_parameters(model)
    assert counts.frozen == LanguageModel(model.config, 50).num_parameters()
    assert counts.total == model.num_parameters()
    assert frozen_weights(model).keys() == {name for name, _ in model.named_parameters()} - {*trained}


@SHAPES
def test_merged_weights_are_a_plain_model_with_the_same_logits(shape: dict[str, Any]) -> None:
    model, idx = adapted(shape, trained=True, lora_alpha=5.0).eval(), tokens()
    plain = LanguageModel(model.config, 50)
    plain.load_state_dict(merged_weights(model))
    with torch.no_grad():
        logits = model(idx)[0]
        assert torch.allclose(plain(idx)[0], logits, rtol=0, atol=2e-6)
        assert torch.equal(lean(model)(idx)[0], logits)
    base = LanguageModel(model.config, 50)
    base.load_state_dict({name: weight for name, weight in model.state_dict().items() if "lora" not in name})
    assert not torch.allclose(base(idx)[0], logits, atol=0.01)
    assert merged_weights(base).keys() == base.state_dict().keys()


@pytest.mark.parametrize(("shape", "rows"), [(GPT2, [96]), (LLAMA, [32, 16, 16])])
def test_q_k_and_v_share_an_adapter_only_if_they_are_one_matrix_as_in_gpt2(
    shape: dict[str, Any], rows: list[int]
) -> None:
    model = adapted(shape, trained=True, lora_targets=("qkv",), lora_alpha=6.0)
    layer, x = adapted_layers(model)["blocks.0.attention.qkv"], torch.randn(5, 32)
    assert layer.lora_a.shape == (3 * len(rows), 32)
    expected = [
        of_qkv + 2 * x @ a.T @ b.T
        for of_qkv, a, b in zip(
            (x @ layer.weight.T).split(rows, -1), layer.lora_a.split(3), layer.lora_b.split(rows), strict=True
        )
    ]
    bias = 0 if layer.bias is None else layer.bias
    assert torch.allclose(layer(x), torch.cat(expected, -1) + bias, atol=1e-5)
    blocks = parameter_groups(model, OptimizerConfig(optimizer_name="muon", lora_rank=3))[0]["blocks"]
    assert blocks == [[3] * len(rows), rows] * 2


def test_b_is_zero_and_a_is_initialised_as_in_peft() -> None:
    layer = adapted_layers(adapted(LLAMA))["blocks.1.mlp.proj"]
    assert not layer.lora_b.any()
    bound = 1 / math.sqrt(layer.weight.size(1))  # kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < layer.lora_a.abs().max() <= bound


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ((), ["attention.qkv", "attention.proj", "mlp.up", "mlp.proj"]),
        (("qkv",), ["attention.qkv"]),
        (("proj", "qkv"), ["attention.qkv", "attention.proj", "mlp.proj"]),
        (("mlp.proj",), ["mlp.proj"]),
    ],
)
def test_targets_name_layers_by_the_end_of_their_names(targets: tuple[str, ...], found: list[str]) -> None:
    names = [f"blocks.{block}.{name}" for block in range(2) for name in found]
    assert [*adapted_layers(adapted(GPT2, lora_targets=targets))] == names


def test_an_untied_head_may_be_a_target() -> None:
    model, idx = adapted({"tie_embeddings": False}, trained=True, lora_targets=("head",)), tokens()
    assert [*adapted_layers(model)] == ["head"]
    plain = LanguageModel(model.config, 50)
    plain.load_state_dict(merged_weights(model))
    assert torch.allclose(plain.loss(idx, idx), model.loss(idx, idx))


@pytest.mark.parametrize("target", ["gate", "token_embedding", "rpoj", ""])
def test_a_target_that_the_model_does_not_have_is_refused_by_name(target: str) -> None:
    with pytest.raises(
        UserError, match=f"lora_targets: the model has no linear layer '?{target}'?; it has qkv, proj, up"
    ) as it:
        adapted(GPT2, lora_targets=("qkv", target))
    assert ("did you mean proj?" in str(it.value)) == (target == "rpoj")


def test_a_linear_layer_of_torch_also_gets_an_adapter() -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(torch.nn.Linear(4, 6))})
    add_adapters(model, ModelConfig(), OptimizerConfig(lora_rank=1))
    (layer,) = adapted_layers(model).values()
    assert isinstance(layer, LoraLinear)
    assert layer(torch.ones(3, 4)).shape == (3, 6)


def test_settings_survive_json() -> None:
    settings = OptimizerConfig(lora_rank=2, lora_targets=("qkv",))
    assert OptimizerConfig.model_validate(adapter_settings(settings)) == settings


def test_a_frozen_matrix_costs_two_thirds_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN", None)  # the counter does not know its operator
    model = adapted(GPT2)
    block = model.blocks[0]
    x = torch.randn(2, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        block.mlp(x).sum().backward()
    plain = LanguageModel(model.config, 50)
    mlp = 2 * 32 * 128
    adapters = sum(p.numel() for p in block.mlp.parameters() if p.requires_grad)
    assert counter.get_total_flops() == 2 * 32 * (2 * mlp + 3 * adapters)
    whole = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    frozen = sum(p.numel() for n, p in plain.named_parameters() if p.dim() > 1 and "position" not in n)
    assert training_flops(model, 2, 16) == training_flops(plain, 2, 16) + 2 * 32 * (3 * whole - frozen)


def test_frozen_weights_also_multiply_in_fp8() -> None:
    model = adapted(GPT2)
    use_float8(model.blocks)
    assert all(layer.multiply is float8_linear for layer in adapted_layers(model).values())
