"""LanguageModel compared with a transformer written out step by step, its initialisation, and cached decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch

from model import MLPS, NORMS, KVCache, LanguageModel
from tests.tiny_export import lively
from utils.config.settings import FFN_WIDTHS, ModelConfig

VOCAB = 11
CPU = torch.device("cpu")
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 20}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 20, "rope_high_freq": 32.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rope": {"position": "rope"},
    "rope theta": {"position": "rope", "rope_theta": 50.0},
    "rmsnorm": {"norm": "rmsnorm"},
    "norm eps": {"norm_eps": 0.1},
    "swiglu": {"mlp": "swiglu"},
    "ffn dim": {"ffn_dim": 10},
    "grouped": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1},
    "head dim": {"head_dim": 6},
    "no bias": {"bias": False},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "bias": False, "head_dim": 6},
    "relu2": {"mlp": "relu2"},
    "gelu tanh": {"mlp": "gelu_tanh"},
    "qk norm": {"qk_norm": True},
    "qk rmsnorm": {"qk_norm": True, "norm": "rmsnorm", "position": "rope", "n_kv_head": 2},
    "learned qk norm": {"qk_norm": True, "qk_norm_weights": True, "norm": "rmsnorm", "n_kv_head": 2},
    "learned qk layernorm": {"qk_norm": True, "qk_norm_weights": True},
    "linear rope": {"position": "rope", "rope_scaling": "linear", "rope_factor": 3.0},
    "llama 3 rope": {"position": "rope", "rope_theta": 50.0, "head_dim": 12, **LLAMA3},
    "yarn": {"position": "rope", "rope_theta": 50.0, "head_dim": 12, **YARN},
    "window": {"sliding_window": 6},
    "window of some blocks": {"sliding_window": 2, "full_attention_layers": 1, "position": "rope", "n_kv_head": 2},
    "window beyond the context": {"sliding_window": 30},
    "qkv bias": {"bias": False, "qkv_bias": True},
    "no mlp bias": {"mlp_bias": False},
    "mlp bias": {"bias": False, "mlp_bias": True, "mlp": "swiglu"},
    "no qkv bias": {"qkv_bias": False},
    "untied": {"tie_embeddings": False},
    "softcap": {"logit_softcap": 2.0},
    "bigrams": {"ngram_rows": (7,)},
    "n-grams": {"ngram_rows": (13, 5, 8), "position": "rope"},
    "mixed": {"position": "rope", "mlp": "swiglu", "n_kv_head": 1, "bias": True, "ffn_dim": 20},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant: str, **settings: Any) -> ModelConfig:
    tiny = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 9}
    return ModelConfig(**tiny | VARIANTS[variant] | settings)


def lively_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model whose weights are large enough for every part to matter, biases and norm weights too."""
    torch.manual_seed(0)
    return lively(LanguageModel(config, VOCAB)).to(dtype)


def random_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- reference


def reference_logits(weights: Mapping[str, torch.Tensor], config: ModelConfig, idx: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, V), one explicit operation after the other."""
    T = idx.size(1)
    x = weights["token_embedding.weight"][idx]  # (B, T, C)
    for n, rows in enumerate(config.ngram_rows, start=2):
        x = x + weights[f"ngram_embedding.tables.{n - 2}.weight"][reference_ngram_rows(idx, n, rows)]
    if config.position == "learned":
        x = x + weights["position_embedding.weight"][:T]
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + reference_attention(block, config, reference_norm(x, block, "attention_norm", config), layer)
        x = x + reference_mlp(block, config, reference_norm(x, block, "mlp_norm", config))
    head = weights["token_embedding.weight" if config.tie_embeddings else "head.weight"]
    logits = reference_norm(x, weights, "final_norm", config) @ head.T
    if config.logit_softcap is not None:
        powers = (2 * logits / config.logit_softcap).exp()
        logits = config.logit_softcap * (powers - 1) / (powers + 1)
    return logits


def reference_ngram_rows(idx: torch.Tensor, n: int, rows: int) -> torch.Tensor:
    """(B, T): the row of the n tokens that end at each position, computed with Python integers."""

    def row(tokens: list[int]) -> int:
        ngram = 0
        for token in reversed(tokens):
            ngram = ngram * 0x9E3779B1 + token + 1
        ngram = (ngram + 2**63) % 2**64 - 2**63  # as an int64 wraps around
        return (ngram ^ (ngram >> 29)) % rows

    return torch.tensor(
        [[row(([-1] * n + line)[t + 1 : t + 1 + n]) for t in range(len(line))] for line in idx.tolist()]
    )


def reference_linear(x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def reference_norm(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str, config: ModelConfig
) -> torch.Tensor:
    y = reference_plain_norm(x, config) * weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if config.norm == "layernorm" and config.bias else y


def reference_plain_norm(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    centred = x if config.norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()


def reference_frequency(pair: int, width: int, config: ModelConfig) -> float:
    """theta^(-2i/D), slowed down fully, partly or not at all for a longer context."""
    frequency = config.rope_theta ** (-2 * pair / width)
    slow = frequency / config.rope_factor
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return slow
    context, low, high = config.rope_original_context or 0, config.rope_low_freq, config.rope_high_freq
    if config.rope_scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            return frequency
        if wavelength > context / low:
            return slow
        smooth = (context / wavelength - low) / (high - low)
        return (1 - smooth) * slow + smooth * frequency
    # YaRN, section 3.2: the pair with r rotations is D log(context / 2 pi r) / (2 log theta).
    edges = [width * math.log(context / (2 * math.pi * r)) / (2 * math.log(config.rope_theta)) for r in (high, low)]
    first, last = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), width - 1)
    ramp = min(max((pair - first) / (last - first), 0.0), 1.0)
    return slow * ramp + frequency * (1 - ramp)


def reference_rotation(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """(B, T, D): channels i and i + D/2 are one complex number, turned by position x frequency."""
    T, D = x.shape[1:]
    numbers = torch.complex(x[..., : D // 2], x[..., D // 2 :])  # (B, T, D / 2)
    frequencies = [reference_frequency(i, D, config) for i in range(D // 2)]
    angles = torch.tensor([[t * frequency for frequency in frequencies] for t in range(T)], dtype=torch.float64)
    length = 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling == "yarn" else 1.0
    turned = numbers * torch.polar(torch.full_like(angles, length), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def reference_attention(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, x: torch.Tensor, layer: int
) -> torch.Tensor:
    T = x.size(1)
    H = config.n_head
    K = config.n_kv_head or H
    D = config.head_dim or config.n_embd // H
    qkv = reference_linear(x, weights, "attention.qkv")  # (B, T, (H + 2 K) D)
    heads = [qkv[..., i * D : (i + 1) * D] for i in range(H + 2 * K)]
    q, k, v = heads[:H], heads[H : H + K], heads[H + K :]
    if config.qk_norm_weights:
        q, k = (
            [reference_norm(h, weights, f"attention.{name}_norm", config) for h in heads]
            for name, heads in (("q", q), ("k", k))
        )
    elif config.qk_norm:
        q, k = [reference_plain_norm(h, config) for h in q], [reference_plain_norm(h, config) for h in k]
    if config.position == "rope":
        q, k = [reference_rotation(h, config) for h in q], [reference_rotation(h, config) for h in k]
    outputs = []
    for head in range(H):
        shared = head // (H // K)  # consecutive query heads share a key/value head
        scores = q[head] @ k[shared].transpose(1, 2) / math.sqrt(D)  # (B, T, T)
        back = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        window = config.sliding_window if layer >= config.full_attention_layers else None
        reach = min(config.block_size, window or config.block_size)  # a window slides over a longer text
        seen = (back >= 0) & (back < reach)
        powers = scores.exp().masked_fill(~seen, 0.0)
        outputs.append(powers / powers.sum(-1, keepdim=True) @ v[shared])
    return reference_linear(torch.cat(outputs, -1), weights, "attention.proj")


def reference_mlp(weights: Mapping[str, torch.Tensor], config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    up = reference_linear(x, weights, "mlp.up")
    if config.mlp == "swiglu":
        gate = reference_linear(x, weights, "mlp.gate")
        hidden = gate / (1 + (-gate).exp()) * up
    elif config.mlp == "relu2":
        hidden = torch.where(up > 0, up * up, 0.0)
    elif config.mlp == "gelu_tanh":
        hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        hidden = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
    return reference_linear(hidden, weights, "mlp.proj")


def test_every_kind_in_the_configuration_is_registered() -> None:
    fields = ModelConfig.model_fields
    assert set(get_args(fields["mlp"].annotation)) == MLPS.keys()
    assert set(get_args(fields["norm"].annotation)) == NORMS.keys()
    assert FFN_WIDTHS.keys() <= MLPS.keys()


@every_variant
@pytest.mark.parametrize("length", [1, 5, 9])
def test_logits_equal_the_reference(variant: str, length: int) -> None:
    config = config_of(variant)
    model = lively_model(config, torch.float64)
    idx = random_tokens(3, length)
    logits, loss = model(idx)
    assert loss is None
    assert logits.std() > 0.5  # otherwise the comparison would say little
    torch.testing.assert_close(logits, reference_logits(model.state_dict(), config, idx), atol=1e-6, rtol=1e-6)


@every_variant
def test_loss_and_gradients_equal_the_reference(variant: str) -> None:
    config = config_of(variant)
    model = lively_model(config, torch.float64)
    tokens = random_tokens(3, 10)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    _, loss = model(inputs, targets)
    loss.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = reference_logits(weights, config, inputs)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    expected = (logits.exp().sum(-1).log() - chosen).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=2e-7, rtol=1e-5, msg=name)


def test_targets_may_be_a_slice() -> None:
    tokens = random_tokens(3, 10)
    model = lively_model(config_of("gpt2"))
    _, loss = model(tokens[:, :-1], tokens[:, 1:])
    _, same = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    assert torch.equal(loss, same)


@every_variant
def test_a_token_does_not_change_earlier_logits(variant: str) -> None:
    model = lively_model(config_of(variant))
    idx = random_tokens(2, 9)
    logits, _ = model(idx)
    for t in range(9):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        other, _ = model(changed)
        torch.testing.assert_close(other[:, :t], logits[:, :t], atol=1e-6, rtol=0)
        assert (other[:, t:] - logits[:, t:]).abs().amax(-1).min() > 1e-4


def test_sequences_of_a_batch_do_not_mix() -> None:
    model = lively_model(config_of("llama"))
    idx = random_tokens(3, 9)
    alone = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(model(idx)[0], alone, atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    idx = random_tokens(2, 9)
    without, model = lively_model(config_of("gpt2")), lively_model(config_of("gpt2", dropout=0.5))
    torch.testing.assert_close(model(idx)[0], without(idx)[0], atol=0, rtol=0)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_more_tokens_than_block_size_are_refused() -> None:
    with pytest.raises(AssertionError, match="10 tokens exceed block_size 9"):
        lively_model(config_of("gpt2"))(random_tokens(1, 10))


# ---------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("variant", ["gpt2", "llama", "mixed"])
def test_initialisation_follows_the_table_of_init_weights(variant: str) -> None:
    torch.manual_seed(3)
    config = config_of(variant, n_layer=3, n_embd=64, block_size=32)
    model = LanguageModel(config, 101)
    for name, p in model.named_parameters():
        values = p.detach().double()
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith(".proj.weight") else 0.02
            n = values.numel()
            assert values.mean().abs() < 5 * std / math.sqrt(n), name
            assert values.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * n)), name
            assert values.abs().max() > 2 * std, name  # normal, not uniform
            within_one = (values.abs() < std).double().mean().item()
            assert within_one == pytest.approx(0.6827, abs=5 * math.sqrt(0.6827 * 0.3173 / n)), name


def test_initialisation_depends_on_the_seed_only() -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return LanguageModel(config_of("gpt2"), VOCAB).state_dict()

    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])


@every_variant
def test_loss_at_initialisation_equals_that_of_guessing(variant: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config_of(variant), 50)
    tokens = torch.randint(50, (32, 10))
    _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_number_of_parameters_of_gpt2() -> None:
    V, C, T, L = 65, 16, 9, 2
    attention = C * 3 * C + 3 * C + C * C + C
    mlp = C * 4 * C + 4 * C + 4 * C * C + C
    norm = 2 * C
    model = LanguageModel(config_of("gpt2"), V)
    assert model.num_parameters() == V * C + T * C + L * (attention + mlp + 2 * norm) + norm


def test_number_of_parameters_of_llama() -> None:
    V, C, L, H, K, D = 65, 16, 2, 4, 2, 6
    F = 64  # 8/3 of 16 is 42.7, rounded up to a multiple of 32
    attention = C * (H + 2 * K) * D + H * D * C
    model = LanguageModel(config_of("llama"), V)
    assert model.num_parameters() == V * C + L * (attention + 3 * C * F + 2 * C) + C


@every_variant
def test_the_state_dict_holds_each_parameter_once(variant: str) -> None:
    model = LanguageModel(config_of(variant), VOCAB)
    state = model.state_dict()
    assert state.keys() == dict(model.named_parameters()).keys()
    of_vocabulary = (
        ["token_embedding.weight"] if model.config.tie_embeddings else ["token_embedding.weight", "head.weight"]
    )
    assert [name for name, tensor in state.items() if VOCAB in tensor.shape] == of_vocabulary
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert sum(tensor.numel() for tensor in state.values()) == model.num_parameters()


# ---------------------------------------------------------------------- cached decoding


def decode(model: LanguageModel, idx: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits (B, T, V) from a cache that is fed `lengths` tokens at a time."""
    cache = KVCache(model.config, idx.size(0), model.config.block_size, CPU, next(model.parameters()).dtype)
    logits = [model(part, cache=cache)[0] for part in idx.split(lengths, dim=1)]
    assert cache.lengths == [idx.size(1)] * idx.size(0)
    return torch.cat(logits, dim=1)


@every_variant
@pytest.mark.parametrize(
    "lengths", [[1] * 9, [9], [5, 1, 1, 1, 1], [4, 5], [3, 3, 3], [1, 8], [2, 1, 4, 2]], ids=lambda ls: str(ls)
)
@torch.no_grad()
def test_cached_decoding_equals_a_full_forward_pass(variant: str, lengths: list[int]) -> None:
    model = lively_model(config_of(variant))
    idx = random_tokens(3, 9)
    torch.testing.assert_close(decode(model, idx, lengths), model(idx)[0], atol=1e-5, rtol=0)


@every_variant
@torch.no_grad()
def test_a_rotary_window_slides_as_in_the_reference(variant: str) -> None:
    """Each layer sees the last block_size tokens, so older ones still have an effect through the layers below."""
    config = config_of(variant, position="rope")
    model = lively_model(config, torch.float64)
    idx = random_tokens(2, 3 * config.block_size + 2)
    reference = reference_logits(model.state_dict(), config, idx)
    torch.testing.assert_close(decode(model, idx, [1] * idx.size(1)), reference, atol=1e-6, rtol=1e-6)
    prompt = config.block_size - 1
    after = decode(model, idx, [prompt] + [1] * (idx.size(1) - prompt))
    torch.testing.assert_close(after, reference, atol=1e-6, rtol=1e-6)


@every_variant
@torch.no_grad()
def test_sequences_of_different_length_decode_as_if_alone(variant: str) -> None:
    model = lively_model(config_of(variant))
    lengths, more = [1, 5, 3, 5], 4
    idx = random_tokens(4, 9)
    cache = KVCache(model.config, 4, model.config.block_size, CPU, torch.float32)
    hidden = model.hidden(idx[:, :5], cache, lengths)  # the positions after a sequence are padding
    logits = [model.head_logits(hidden[torch.arange(4), torch.tensor(lengths) - 1])]
    for step in range(more):
        tokens = torch.stack([idx[row, length + step] for row, length in enumerate(lengths)])
        logits.append(model(tokens[:, None], cache=cache)[0][:, -1])
    assert cache.lengths == cache.positions.tolist() == [length + more for length in lengths]
    for row, length in enumerate(lengths):
        alone = model(idx[row : row + 1, : length + more])[0][0, length - 1 :]
        torch.testing.assert_close(torch.stack([step[row] for step in logits]), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_static_cache_masks_the_slots_that_are_not_in_use() -> None:
    model = lively_model(config_of("llama"))
    idx = random_tokens(2, 9)
    cache = KVCache(model.config, 2, 9, CPU, torch.float32)
    cache._static = True  # as on a GPU
    logits = [model(part, cache=cache)[0] for part in idx.split([4, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_may_be_shorter_than_block_size() -> None:
    model = lively_model(config_of("llama"))
    idx = random_tokens(1, 4)
    cache = KVCache(model.config, 1, 4, CPU, torch.float32)
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx)[0], atol=1e-5, rtol=0)


def test_a_cache_holds_key_value_heads_only() -> None:
    cache = KVCache(config_of("one key head"), 3, 7, CPU, torch.float32)
    assert cache.keys.shape == cache.values.shape == (2, 3, 1, 7, 4)
