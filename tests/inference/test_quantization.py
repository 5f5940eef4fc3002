"""Smaller weights: how far they are from float32, and that all variants of the model work with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import LanguageModel
from tests.tiny_export import lively
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.inference import quantization
from utils.inference.decode import generate_tokens
from utils.inference.quantization import Int8Linear, Weights, choose_weights, with_weights
from utils.inference.sampling import SamplingOptions
from utils.nn.linear import Linear

VOCAB = 17
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 2},
    "untied": {"tie_embeddings": False, "qk_norm": True, "logit_softcap": 10.0, "ngram_rows": [11, 13]},
}


def model_of(variant: str) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "dropout": 0.0}
    return lively(LanguageModel(ModelConfig(**sizes | VARIANTS[variant]), VOCAB), 0.2)


def test_a_weight_is_rounded_to_the_nearest_of_255_steps() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    layer = Int8Linear(weight, torch.arange(24.0).bfloat16())
    steps = weight.abs().amax(1) / 127
    assert ((layer.weight * steps[:, None] - weight).abs() <= steps[:, None] / 2 + 1e-6).all()
    for shape in ((2, 5, 32), (3, 20, 32)):  # few rows and many
        x = torch.randn(shape).bfloat16()
        expected = x.float() @ (layer.weight * steps[:, None]).T + torch.arange(24.0)
        torch.testing.assert_close(layer(x).float(), expected, atol=0.15, rtol=0.02)


@torch.no_grad()
def test_float32_is_the_model_itself_with_matrices_stored_by_columns() -> None:
    model = model_of("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert with_weights(model, "float32") is model
    matrix = model.blocks[0].mlp.up.weight
    assert matrix.stride() == (1, matrix.size(0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_smaller_weights_are_stored_by_rows() -> None:
    model = with_weights(model_of("llama"), "float32")
    for weights in ("bfloat16", "int8"):
        assert all(tensor.is_contiguous() for tensor in with_weights(model, weights).state_dict().values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.1), ("int8", 0.1)])
@torch.no_grad()
def test_smaller_weights_give_nearly_the_same_logits(variant: str, weights: Weights, tolerance: float) -> None:
    model = model_of(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = with_weights(model, weights)
    idx = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    exact, rounded = model(idx)[0], small(idx)[0].float()
    assert (exact - rounded).abs().max() > 0
    assert (exact - rounded).std() < tolerance * exact.std()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    tokens = list(generate_tokens(small, [1, 2], 40, SamplingOptions(), seed=0))
    assert len(tokens) == 40


def test_all_weights_that_are_read_for_each_token_are_smaller() -> None:
    model = model_of("gpt2")
    int8, bfloat16 = with_weights(model, "int8"), with_weights(model, "bfloat16")
    assert not any(isinstance(module, Linear) for module in int8.modules())
    assert isinstance(int8.head, Int8Linear)
    assert {parameter.dtype for parameter in bfloat16.parameters()} == {torch.bfloat16}


def test_rotary_factors_keep_their_precision() -> None:
    assert with_weights(model_of("llama"), "bfloat16").cos.dtype == torch.float32


def test_without_the_private_kernel_int8_layers_use_public_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(8, 32), None)
    x = torch.randn(2, 32).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(quantization, "INT8_PRODUCT", None)
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.1)


def test_automatic_weights_are_bfloat16_on_a_gpu_with_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_units, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(quantization, "has_bf16_units", lambda _, has=has_units: has)
        assert choose_weights("auto", cuda) == expected
        assert choose_weights("auto", cpu) == "float32"
        assert choose_weights("int8", cuda) == "int8"


def test_int8_on_a_gpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    with pytest.raises(UserError, match="on a GPU, torch's product of int8 weights is slower"):
        with_weights(model_of("gpt2"), "int8")
