"""The model as an ONNX graph: one step, with a cache of fixed capacity as input and output."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LanguageModel, run_block
from utils.nn.kv_cache import KVCache
from utils.terminal.streams import without_warnings

INPUTS = ("input_ids", "position", "keys", "values")
OUTPUTS = ("logits", "new_keys", "new_values")
LARGEST_FILE = 1 << 30  # bytes; a graph of more than 2 GiB must keep its weights in another file
OPSET = 20


class _Cache:
    """A KVCache for one sequence that does not change its inputs.

    keys, values: (L, 1, K, S, D), S = capacity. `new_keys` and `new_values` collect the updated (1, K, S, D) of each
    layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, model: LanguageModel) -> None:
        self._keys, self._values, self._positions, self._config = keys, values, positions, model.config
        self.new_keys: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []
        slots = torch.arange(keys.size(3))
        self._back = positions[:, None] - slots  # (T, S), distance from a new token to that in a slot

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As in KVCache."""
        B, T, H, _ = q.shape
        keys = self._keys[layer].index_copy(2, self._positions, k.transpose(1, 2))  # (1, K, S, D)
        values = self._values[layer].index_copy(2, self._positions, v.transpose(1, 2))
        self.new_keys.append(keys)
        self.new_values.append(values)
        visible = self._back >= 0
        if (window := self._config.window(layer)) is not None:
            visible = visible & (self._back < window)
        groups = H // keys.size(1)
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible)  # (1, H, T, D)
        return y.transpose(1, 2).reshape(B, T, -1)


class CachedStep(nn.Module):
    """Compute the logits of new tokens, and the cache with these tokens added.

    Inputs: input_ids (1, T); position (), the number of earlier tokens; keys and values (L, 1, K, S, D), zeros at the
    start of a text. position + T <= S. Outputs: logits (1, T, V); the new keys and values.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = self.model
        positions = position + torch.arange(input_ids.size(1))
        x, rope = model.token_embedding(input_ids), None
        if model.config.position == "learned":
            x = x + model.position_embedding.weight[positions]
        else:
            rope = model.cos[positions], model.sin[positions]
        cache = _Cache(keys, values, positions, model)
        for block in model.blocks:
            x = run_block(block, x, rope, cast(KVCache, cache))
        logits = model.head_logits(model.final_norm(x))
        return logits, torch.stack(cache.new_keys), torch.stack(cache.new_values)


def cache_shape(model: LanguageModel) -> tuple[int, ...]:
    """The shape (L, 1, K, S, D) of keys and of values; S is the context of the model."""
    config = model.config
    return config.n_layer, 1, config.kv_heads, config.block_size, config.head_width


def write_graph(model: LanguageModel, path: Path) -> None:
    """Write the step of a model, which is on the CPU and in eval mode; the weights of a large one go to PATH.data."""
    T = min(3, model.config.block_size)  # only an example: the graph accepts any T
    empty = torch.zeros(cache_shape(model))
    example = (torch.zeros(1, T, dtype=torch.int64), torch.tensor(0), empty, empty.clone())
    tokens = {1: torch.export.Dim.DYNAMIC} if T > 1 else {}
    size = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad(), without_warnings(), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            CachedStep(model),
            example,
            path,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes={"input_ids": tokens, "position": {}, "keys": {}, "values": {}},
            opset_version=OPSET,
            external_data=size > LARGEST_FILE,
            dynamo=True,
        )
