"""Private operators of torch, and what is computed instead if a release does not have them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.test_model import config_of, lively_model, random_tokens
from utils.nn import attention, gelu, linear
from utils.nn.private import private_operator
from utils.optim import adamw
from utils.optim.adamw import AdamW

OPERATORS = [(linear, "ONEDNN"), (attention, "SOFTMAX_BACKWARD"), (gelu, "SIGMOID_BACKWARD"), (adamw, "FUSED_ADAMW")]


def test_an_operator_is_looked_up_by_its_path() -> None:
    assert private_operator("ops.aten.sigmoid.default") is torch.ops.aten.sigmoid.default


@pytest.mark.parametrize("path", ["_no_such_operator", "ops.no_such_library.add", "ops.aten.add.no_such_overload"])
def test_an_operator_that_torch_does_not_have_is_none(path: str) -> None:
    assert private_operator(path) is None


def test_this_release_of_torch_has_all_private_operators() -> None:
    assert [name for module, name in OPERATORS if getattr(module, name) is None] == []


def test_without_private_operators_the_public_ones_of_torch_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and weights of a model are nearly the same, and none of our own functions is called."""
    results = []
    for available in (True, False):
        model = lively_model(config_of("gelu tanh", n_embd=64, block_size=64)).train()
        optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.01, "betas": (0.9, 0.99), "eps": 0.01}])
        optimizer.param_groups[0] |= {"weight_decay": 0.1, "fused": True}
        if not available:
            for module, name in OPERATORS:
                monkeypatch.setattr(module, name, None)
            for function in (linear.OneDNNLinear, attention.ShortAttention, gelu.SigmoidGELU):
                monkeypatch.setattr(function, "apply", None)
        idx = random_tokens(8, 64)
        losses = []
        for _ in range(3):
            _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, gradients, [parameter.detach() for parameter in model.parameters()]))
        assert {state["step"].item() for state in optimizer.state.values()} == {3}
    (losses, gradients, weights), (public_losses, public_gradients, public_weights) = results
    assert losses == pytest.approx(public_losses, rel=1e-3)
    for mine, theirs in zip(gradients, public_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=2e-3)
    for mine, theirs in zip(weights, public_weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("name", ["ONEDNN", "SOFTMAX_BACKWARD", "SIGMOID_BACKWARD"])
def test_without_its_operator_a_layer_equals_torch_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, operator in OPERATORS:
        if operator == name:
            monkeypatch.setattr(module, name, None)
    x, weight = torch.randn(2, 64, 512), torch.randn(96, 512)
    q = x.view(2, 64, 8, 64)
    if name == "ONEDNN":
        assert torch.equal(linear.linear(x, weight), F.linear(x, weight))
    elif name == "SIGMOID_BACKWARD":
        assert torch.equal(gelu.gelu_tanh(x), F.gelu(x, approximate="tanh"))
    else:
        heads = q.transpose(1, 2)
        expected = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        assert torch.equal(attention.causal_attention(q, q, q), expected)
