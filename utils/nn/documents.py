"""Rows that hold several documents: attention and positions stay within each document, as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from utils.nn.attention import causal_attention


class DocumentMask:
    """Separates the documents in a batch of rows.

    Each document begins with the same token; a row may begin in the middle of a document. A forward pass uses the mask
    in place of a KVCache: `begin` gives the positions, each layer calls `attend`.

    Args:
        idx: (B, T) token ids.
        token: the id that each document begins with.
        dtype: the precision of the mask, which is that of the queries.
        dropout: the probability of dropping an attention weight.
        windows: the window of each layer (see `causal_attention`); empty: no layer has one.

    positions: (B, T), counted from the start of the document.
    mask: (B, 1, T, T), added to the scores: zero for the tokens that a token attends to, else minus infinity.
    """

    def __init__(
        self,
        idx: torch.Tensor,
        token: int,
        dtype: torch.dtype,
        dropout: float = 0.0,
        windows: Sequence[int | None] = (),
    ) -> None:
        B, T = idx.shape
        indices = torch.arange(T, device=idx.device)
        starts = torch.where(idx == token, indices, 0).cummax(dim=1).values  # (B, T), of each token's document
        self.positions = indices - starts
        # A token sees itself and the tokens before it, back to the start of its document.
        seen = (indices <= indices[:, None]) & (indices >= starts[:, :, None])  # (B, T, T)
        zero = torch.zeros((), dtype=dtype, device=idx.device)
        self.mask = torch.where(seen, zero, -math.inf)[:, None]
        self.lengths = [0] * B
        self._dropout = dropout
        self._windows = windows

    def begin(self, idx: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """The positions of the tokens, (B, T)."""
        return self.positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Each token attends to itself and the tokens before it in its document (see `causal_attention`)."""
        return causal_attention(q, k, v, self._dropout, self.mask, self._windows[layer] if self._windows else None)

    def end(self) -> None: ...
