"""LanguageModel: one decoder-only transformer, its variants chosen by ModelConfig.

Shapes: B batch, T time (context), C channels (n_embd), V vocabulary, H query heads, K key/value heads,
D head dimension, F hidden width of the MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.config import ModelConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm [Ba et al. 2016] with a switch for its bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """RMSNorm [Zhang and Sennrich 2019]: no mean, no bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=config.norm_eps)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class KVCache:
    """Keys and values of the tokens seen so far, for decoding one token at a time.

    Buffers are allocated once for `max_length` tokens; `length` of them are in use.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch_size, config.kv_heads, max_length, config.head_width)  # (L, B, K, T, D)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, K, T, D) after the tokens in use; all keys and values up to there."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rope_angles(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotation angles, each (block_size, D / 2) [Su et al. 2021, RoFormer]."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width  # (D / 2,)
    angles = torch.outer(torch.arange(config.block_size).float(), config.rope_theta**-exponents)  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel i with channel i + D / 2 (the half-split layout of GPT-NeoX and Llama).

    Args:
        x: (B, H, T, D).
        cos, sin: (T, D / 2).
    """
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)  # (B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention; with fewer key/value heads it is grouped-query attention [Ainslie et al. 2023]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.kv_heads) * self.head_width, bias=config.bias)
        self.proj = nn.Linear(self.n_head * self.head_width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, cache: KVCache | None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        sizes = [self.n_head, self.kv_heads, self.kv_heads]
        q, k, v = (
            self.qkv(x).view(B, T, sum(sizes), self.head_width).transpose(1, 2).split(sizes, dim=1)
        )  # (B, H|K, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D), S >= T tokens so far
            if T > 1 and cache.length > 0:  # row t sees the cached tokens and the new ones up to itself
                S = k.size(2)
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(diagonal=S - T)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
            enable_gqa=self.kv_heads != self.n_head,
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.resid_dropout(self.proj(y))


class MLP(nn.Module):
    """The position-wise feed-forward part with GELU [Hendrycks and Gimpel 2016]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.proj = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.resid_dropout(self.proj(F.gelu(self.up(x))))


class SwiGLU(nn.Module):
    """The gated feed-forward part of Llama: proj(silu(gate x) * up x) [Shazeer 2020]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.proj = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.resid_dropout(self.proj(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, cache: KVCache | None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer [Radford et al. 2019, GPT-2].

    The output head is the token embedding (tied): one matrix, one entry in the state dict.

    Args:
        config: the architecture.
        vocab_size: V, from the tokenizer.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rope_angles(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = NORMS[config.norm](config)
        init_weights(self)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the next token at every position, and the mean cross-entropy.

        Args:
            idx: (B, T) token ids, int64.
            targets: (B, T) the tokens to predict, or None.
            cache: earlier tokens of the same sequences; `idx` follows them and is appended.

        Returns:
            logits (B, T, V), and the loss in nats per token, or None without targets.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= self.config.block_size, f"{start + T} tokens exceed block_size {self.config.block_size}"
        x = self.token_embedding(idx)  # (B, T, C)
        rope = None
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[start : start + T]  # (T, C) broadcasts over B
        else:
            rope = self.cos[start : start + T], self.sin[start : start + T]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache is not None:
            cache.length += T
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, self.vocab_size).float(), targets.reshape(-1))

    def num_parameters(self) -> int:
        """Trainable numbers; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


def init_weights(model: LanguageModel) -> None:
    """Initialise all parameters as GPT-2 does [Radford et al. 2019, section 2.3].

    | parameter                                  | distribution                        |
    |--------------------------------------------|-------------------------------------|
    | token and position embeddings              | normal(0, 0.02)                     |
    | linear weights                             | normal(0, 0.02)                     |
    | projections into the residual stream       | normal(0, 0.02 / sqrt(2 n_layer))   |
    | biases                                     | 0                                   |
    | norm weights                               | 1                                   |
    """
    residual_std = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual_std if name.endswith(".proj") else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, LayerNorm | RMSNorm):
            module.reset_parameters()
