"""LanguageModel: one decoder-only transformer, its variants chosen by ModelConfig.

Shapes: B batch, T time (context), C channels (n_embd), V vocabulary, H query heads, K key/value heads,
D head dimension, F hidden width of the MLP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.config.settings import ModelConfig
from utils.nn.activation_checkpointing import recomputed
from utils.nn.attention import causal_attention
from utils.nn.costs import shapes_only
from utils.nn.cross_entropy import chunked_cross_entropy, plain_cross_entropy, rows_at_once
from utils.nn.documents import DocumentMask
from utils.nn.gelu import gelu_tanh
from utils.nn.kv_cache import NO_TOKEN, KVCache
from utils.nn.lean import is_patched, may_be_plain
from utils.nn.linear import Linear, linear, matrix_of, product_dtype
from utils.nn.roles import (
    BIAS,
    EMBEDDING,
    HEAD,
    MATRIX,
    RESIDUAL,
    SCALE,
    TIED_EMBEDDING,
    ZERO_EMBEDDING,
    Role,
    declare,
    declared_roles,
)
from utils.nn.rotary import rope_factors, rotate

Rope = tuple[torch.Tensor, torch.Tensor]  # the cosines and sines of `rope_factors`


@may_be_plain
class LayerNorm(nn.LayerNorm):
    """LayerNorm [Ba et al. 2016] with an optional bias."""

    plain = staticmethod(F.layer_norm)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)
        declare(self, weight=SCALE, bias=BIAS)


@may_be_plain
class RMSNorm(nn.RMSNorm):
    """RMSNorm [Zhang and Sennrich 2019]: no mean, no bias."""

    plain = staticmethod(F.rms_norm)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=config.norm_eps)
        declare(self, weight=SCALE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C). The fused kernel needs x and weight in one precision, and accumulates in float32."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Norm(Protocol):
    """A class of norm layers over n_embd channels; `plain(x, shape, eps=...)` is the norm without learned weights."""

    plain: Callable[..., torch.Tensor]

    def __call__(self, config: ModelConfig) -> nn.Module: ...


NORMS: dict[str, Norm] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # Hendrycks and Gimpel 2016
    "gelu_tanh": gelu_tanh,  # GPT-2's own
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, Primer
}


@may_be_plain
class NgramEmbedding(nn.Module):
    """The sum of one vector for the last 2 tokens, one for the last 3, ... [Pagnoni et al. 2024, BLT, section 3.2.1].

    Each length has a table whose rows are found by a hash, so different n-grams may share a row. A lookup costs no
    matrix product, and the layers need not learn what already follows from the last few tokens.
    """

    FACTOR = 0x9E3779B1  # of Knuth's multiplicative hashing: an odd number near 2^32 / golden ratio

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows = config.ngram_rows
        self.tables = nn.ModuleList(
            declare(nn.Embedding(rows, config.n_embd), weight=ZERO_EMBEDDING) for rows in config.ngram_rows
        )

    def forward(self, idx: torch.Tensor, before: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, C) for the tokens idx (B, T), with the tokens (B, N - 1) that precede them.

        Args:
            positions: (B, T), the position of each token in its document, if rows hold several documents: n-grams do
                not reach back beyond the start of the document.
        """
        T, reach = idx.size(1), before.size(1)
        tokens = torch.cat((before, idx), dim=1) + 1  # (B, N - 1 + T)
        ngrams = tokens[:, reach:]  # (B, T)
        vectors = []
        for back, (rows, table) in enumerate(zip(self.rows, self.tables, strict=True), start=1):
            earlier = tokens[:, reach - back : reach - back + T]  # (B, T)
            if positions is not None:
                earlier = earlier.where(positions >= back, NO_TOKEN + 1)
            ngrams = ngrams * self.FACTOR + earlier  # int64 wraps around
            vectors.append(table((ngrams ^ (ngrams >> 29)) % rows))
        return functools.reduce(torch.add, vectors)


@may_be_plain
class Attention(nn.Module):
    """Causal self-attention; with fewer key/value than query heads, grouped-query attention [Ainslie et al. 2023]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.kv_heads, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.window = config.window(layer)
        self.norm = functools.partial(NORMS[config.norm].plain, eps=config.norm_eps) if config.qk_norm else None
        self.q_norm: nn.Module | None = None  # q_norm and k_norm replace norm if they have learned weights
        self.k_norm: nn.Module | None = None
        if config.qk_norm_weights:
            head_config = config.model_copy(update={"n_embd": config.head_width})
            self.q_norm, self.k_norm = NORMS[config.norm](head_config), NORMS[config.norm](head_config)
        rows = [heads * self.head_width for heads in (self.n_head, self.kv_heads, self.kv_heads)]  # of q, k and v
        self.qkv = declare(Linear(config.n_embd, sum(rows), config.has_qkv_bias), weight=MATRIX.stacked(*rows))
        self.proj = declare(Linear(rows[0], config.n_embd, config.bias), weight=RESIDUAL)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope: Rope | None, cache: KVCache | DocumentMask | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        H, K, D = self.n_head, self.kv_heads, self.head_width
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        if self.norm is None and rope is None:
            q, k, v = qkv.split_with_sizes((H, K, K), dim=2)  # (B, T, H | K, D)
        else:
            qk, v = qkv.split_with_sizes((H + K, K), dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = qk.split_with_sizes((H, K), dim=2)
                qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
            elif self.norm is not None:
                qk = self.norm(qk, (D,))
            if rope is not None:
                qk = rotate(qk, *rope)
            q, k = qk.split_with_sizes((H, K), dim=2)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q, k, v, dropout, window=self.window)  # (B, T, H * D)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.resid_dropout(self.proj(y))

    def mixing_products(self, context: float) -> float:
        """Multiplications of q k^T, and of the attention weights times v; see MixesTokens."""
        if self.window is not None and self.window < (length := 2 * context - 1):
            # The first tokens attend to 1, 2, ... keys, all others to a full window.
            context = self.window * (1 - (self.window - 1) / (2 * length))
        return 2 * self.n_head * self.head_width * context


@may_be_plain
class MLP(nn.Module):
    """The position-wise feed-forward layer: proj(activation(up x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.up = Linear(config.n_embd, config.ffn_width, bias=config.has_mlp_bias)
        self.proj = declare(Linear(config.ffn_width, config.n_embd, bias=config.has_mlp_bias), weight=RESIDUAL)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.resid_dropout(self.proj(self.activation(self.up(x))))


@may_be_plain
class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama: proj(silu(gate x) * up x) [Shazeer 2020]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.ffn_width, bias=config.has_mlp_bias)
        self.up = Linear(config.n_embd, config.ffn_width, bias=config.has_mlp_bias)
        self.proj = declare(Linear(config.ffn_width, config.n_embd, bias=config.has_mlp_bias), weight=RESIDUAL)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.resid_dropout(self.proj(F.silu(self.gate(x)) * self.up(x)))


MLPS: dict[str, Callable[[ModelConfig], nn.Module]] = {  # each maps (B, T, C) to (B, T, C)
    **dict.fromkeys(ACTIVATIONS, MLP),
    "swiglu": SwiGLU,
}


@may_be_plain
class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x: torch.Tensor, rope: Rope | None, cache: KVCache | DocumentMask | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))


@may_be_plain
class LanguageModel(nn.Module):
    """A decoder-only transformer [Radford et al. 2019, GPT-2].

    A tied output head is the token embedding: one matrix, one entry in the state dict.

    Args:
        config: the architecture.
        vocab_size: V, from the tokenizer.

    document_token: if set, each document in a row begins with this token; attention stays within a document, and
        positions restart at each. A KVCache holds one document per sequence.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    initialised: dict[nn.Parameter, Role]

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        role = TIED_EMBEDDING if config.tie_embeddings else EMBEDDING
        self.token_embedding = declare(nn.Embedding(vocab_size, config.n_embd), weight=role)
        if config.ngram_rows:
            self.ngram_embedding = NgramEmbedding(config)
        if config.position == "learned":
            self.position_embedding = declare(nn.Embedding(config.block_size, config.n_embd), weight=EMBEDDING)
        else:
            # Always on the CPU: on the meta device, which `outline` uses, these functions would import the compiler.
            cos, sin = rope_factors(config, torch.arange(config.block_size, device="cpu").float())
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = NORMS[config.norm](config)
        self.head: nn.Module | None = None  # None: the token embedding is the head
        if not config.tie_embeddings:
            self.head = declare(Linear(config.n_embd, vocab_size, bias=config.head_bias), weight=HEAD)
        self.fp8_logits = False  # compute the logits in 8 bits; only in training on CUDA
        self.recomputes = False  # keep only the input of each block for the backward pass
        self.document_token: int | None = None
        init_weights(self)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the next token at every position, and the mean cross-entropy.

        Args:
            idx: (B, T) token ids, int64.
            targets: (B, T) the token ids to predict; those that are IGNORED (-100) do not count.
            cache: the earlier tokens of the same sequences; `idx` follows them and is appended.

        Returns:
            The logits (B, T, V), and the mean loss in nats per target (None without targets).
        """
        logits = self.head_logits(self.hidden(idx, cache))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, plain_cross_entropy(logits, targets)

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of `forward`, (), without the logits, which on CUDA are never in memory all at once."""
        if type(self).forward is not LanguageModel.forward or is_patched(self):
            return self(idx, targets)[1]
        return self.head_loss(self.hidden(idx), targets)

    def head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy, (), for the input of the head, hidden (B, T, C), and targets (B, T)."""
        weight = self.token_embedding.weight if self.head is None else matrix_of(self.head)
        rows = rows_at_once(hidden.device, targets.numel(), self.vocab_size)
        if not rows or weight is None or type(self).head_logits is not LanguageModel.head_logits:
            return plain_cross_entropy(self.head_logits(hidden), targets)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (B T, C), (B T,)
        return chunked_cross_entropy(hidden, weight, targets, rows, self.config.logit_softcap, self.fp8_logits)

    def hidden(
        self, idx: torch.Tensor, cache: KVCache | DocumentMask | None = None, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The input of the head: (B, T, C) for tokens idx (B, T).

        Args:
            cache: the earlier tokens of the same sequences; `idx` follows them and is appended.
            lengths: the lengths of the sequences in idx, if they differ (see KVCache.begin).
        """
        if cache is None:
            cache = self.documents(idx)
        x, rope = self.embed(idx, cache, lengths)
        run = recomputed(run_block, self.config.dropout) if self.recomputes else run_block
        for block in self.blocks:
            x = run(block, x, rope, cache)
        if cache is not None:
            cache.end()
        return self.final_norm(x)

    def documents(self, idx: torch.Tensor) -> DocumentMask | None:
        """The mask that separates the documents in each row of idx (B, T); None if a row is one text."""
        if self.document_token is None:
            return None
        assert self.config.block_size >= idx.size(1)
        weight = self.token_embedding.weight
        dtype = product_dtype(weight) if weight.is_cuda else weight.dtype
        dropout = self.config.dropout if self.training else 0.0
        windows = (
            [self.config.window(layer) for layer in range(self.config.n_layer)] if self.config.sliding_window else ()
        )
        return DocumentMask(idx, self.document_token, dtype, dropout, windows)

    def embed(
        self, idx: torch.Tensor, cache: KVCache | DocumentMask | None = None, lengths: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, Rope | None]:
        """The input of the first block, (B, T, C), and the rotary factors (see `rotate`); arguments as in `hidden`."""
        T = idx.size(1)
        x = self.token_embedding(idx)  # (B, T, C)
        if self.config.ngram_rows:
            reach = len(self.config.ngram_rows)
            before = (
                cache.tokens_before(reach) if isinstance(cache, KVCache) else idx.new_full((len(idx), reach), NO_TOKEN)
            )
            x = x + self.ngram_embedding(idx, before, cache.positions if isinstance(cache, DocumentMask) else None)
        positions: slice | torch.Tensor  # (B, T), or one slice for all sequences
        if cache is None:
            assert self.config.block_size >= T, f"{T} tokens exceed block_size {self.config.block_size}"
            positions, end = slice(T), T
        else:
            positions, end = cache.begin(idx, lengths), max(cache.lengths) + T
        rope = None
        if self.config.position == "learned":
            table = self.position_embedding
            x = x + (
                table.weight[positions] if isinstance(positions, slice) else table(positions)
            )  # (T, C) or (B, T, C)
        elif end <= self.config.block_size:
            rope = self.cos[positions], self.sin[positions]
        else:  # with a sliding window positions are unbounded; double precision, because the angles become large
            if isinstance(positions, slice):
                positions = torch.arange(positions.start, positions.stop, device=idx.device)
            cos, sin = rope_factors(self.config, positions.double())
            rope = cos.to(self.cos.dtype), sin.to(self.sin.dtype)
        if x.is_cuda:  # the precision of autocast, so that most kernels move half the bytes
            x = x.to(product_dtype(x))
        return self.dropout(x), rope

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V)."""
        logits = linear(hidden, self.token_embedding.weight) if self.head is None else self.head(hidden)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def num_parameters(self) -> int:
        """The number of parameters; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


def run_block(
    block: nn.Module,
    x: torch.Tensor,
    rope: Rope | None,
    cache: KVCache | DocumentMask | None,
) -> torch.Tensor:
    """(B, T, C) -> (B, T, C). One function for all layers, so that its compiled code serves them all."""
    return block(x, rope, cache)


def outline(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """A model whose parameters have shapes but no memory, for counting parameters, operations and bytes."""
    with shapes_only():
        return LanguageModel(config, vocab_size)


def init_weights(model: LanguageModel) -> None:
    """Initialise the parameters that have a role as GPT-2 does [Radford et al. 2019, section 2.3].

    | role (utils/nn/roles.py)                   | distribution                        |
    |--------------------------------------------|-------------------------------------|
    | embedding                                  | normal(0, 0.02)                     |
    | matrix, head                               | normal(0, 0.02)                     |
    | residual projection                        | normal(0, 0.02 / sqrt(2 n_layer))   |
    | the same and head, with zero_init          | 0                                   |
    | zero embedding                             | 0                                   |
    | bias                                       | 0                                   |
    | scale                                      | 1                                   |

    A parameter without a role keeps the initialisation of its own module. A subclass whose __init__ declares more
    roles must call this function again at its end (`build_state` asserts that).
    """
    deviations = {
        "embedding": 0.02,
        "matrix": 0.02,
        "head": 0.02,
        "residual projection": 0.02 / math.sqrt(2 * model.config.n_layer),
        "zero embedding": 0.0,  # drawn nevertheless: skipping the draw would change all other numbers of a seed
    }
    zeros = {"bias", "residual projection", "head"} if model.config.zero_init else {"bias"}
    model.initialised = declared_roles(model)
    for parameter, role in model.initialised.items():
        if role.name == "scale":
            nn.init.ones_(parameter)
        elif role.name in zeros:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=deviations[role.name])
