"""An independent reader of GGUF files, written after their specification, which computes the model in NumPy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")  # by the number of the type
STRING, ARRAY = 8, 9
Array = np.ndarray[Any, Any]


class GGUF:
    """The metadata and tensors of a file."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._at = 4
        assert self._data[:4] == b"GGUF"
        assert self._scalar("<I") == 3
        tensors, pairs = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        places = {}
        for _ in range(tensors):
            name = self._string()
            shape = [self._scalar("<Q") for _ in range(self._scalar("<I"))][::-1]
            places[name] = shape, self._scalar("<I"), self._scalar("<Q")
        start = -(-self._at // 32) * 32
        self.types = {name: kind for name, (_, kind, _) in places.items()}
        self.tensors = {name: self._tensor(shape, kind, start + at) for name, (shape, kind, at) in places.items()}

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(kind) for _ in range(count)]
        form = SCALARS[kind]
        assert form
        return self._scalar(form)

    def _tensor(self, shape: list[int], kind: int, at: int) -> Array:
        count = int(np.prod(shape))
        if kind in (0, 1):
            return np.frombuffer(self._data, "<f4" if kind == 0 else "<f2", count, at).reshape(shape).astype(np.float64)
        assert kind == 8  # blocks of 32 numbers with one scale
        blocks = np.frombuffer(self._data, np.dtype([("scale", "<f2"), ("numbers", "i1", 32)]), count // 32, at)
        numbers = blocks["scale"].astype(np.float64)[:, None] * blocks["numbers"]
        return numbers.reshape(shape)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokens = self.metadata["tokenizer.ggml.tokens"]
        if self.metadata["tokenizer.ggml.model"] == "rwkv":  # ours have one token per character
            plain = [token.encode().decode("unicode_escape") for token in tokens]
            return [plain.index(character) for character in text]
        assert self.metadata["tokenizer.ggml.pre"] == "gpt-2"
        merges = [tuple(pair.split(" ")) for pair in self.metadata["tokenizer.ggml.merges"]]
        vocab = {token: place for place, token in enumerate(tokens)}
        for first, second in merges:  # this package requires the parts of a merge to be tokens
            for part in (first, second, first + second):
                vocab.setdefault(part, len(vocab))
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return list(tokenizer.encode(text).ids)

    def logits(self, ids: list[int]) -> Array:
        """Logits (T, V) of the whole sequence."""
        architecture = self.metadata["general.architecture"]
        facts = {
            key.removeprefix(f"{architecture}."): value
            for key, value in self.metadata.items()
            if key.startswith(f"{architecture}.")
        }
        x = self.tensors["token_embd.weight"][ids]
        if architecture == "gpt2":
            x = x + self.tensors["position_embd.weight"][: len(ids)]
        for layer in range(facts["block_count"]):
            x = x + self._attention(self._norm(x, f"blk.{layer}.attn_norm", facts), f"blk.{layer}", architecture, facts)
            h = self._norm(x, f"blk.{layer}.ffn_norm", facts)
            up = self._linear(h, f"blk.{layer}.ffn_up")
            if architecture == "gpt2":
                inner = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            else:
                gate = self._linear(h, f"blk.{layer}.ffn_gate")
                inner = gate / (1 + np.exp(-gate)) * up
            x = x + self._linear(inner, f"blk.{layer}.ffn_down")
        return self._linear(self._norm(x, "output_norm", facts), "output")  # even if the head is tied

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def _norm(self, x: Array, name: str, facts: dict[str, Any]) -> Array:
        if "attention.layer_norm_epsilon" in facts:
            x = x - x.mean(-1, keepdims=True)
            epsilon = facts["attention.layer_norm_epsilon"]
        else:
            epsilon = facts["attention.layer_norm_rms_epsilon"]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        return x * self.tensors[f"{name}.weight"] + self.tensors.get(f"{name}.bias", 0.0)

    def _attention(self, x: Array, block: str, architecture: str, facts: dict[str, Any]) -> Array:
        T, H, K = len(x), facts["attention.head_count"], facts["attention.head_count_kv"]
        D = facts["attention.key_length"]
        if architecture == "gpt2":
            q, k, v = np.split(self._linear(x, f"{block}.attn_qkv"), 3, axis=-1)
        else:
            q, k, v = (self._linear(x, f"{block}.attn_{part}") for part in "qkv")
        q, k, v = q.reshape(T, H, D), k.reshape(T, K, D), v.reshape(T, K, D)
        if architecture == "qwen3":
            q, k = self._norm(q, f"{block}.attn_q_norm", facts), self._norm(k, f"{block}.attn_k_norm", facts)
        if architecture != "gpt2":
            angles = np.arange(T)[:, None] * facts["rope.freq_base"] ** (-np.arange(0, D, 2) / D)
            angles = angles / self.tensors.get("rope_freqs.weight", 1.0) / facts.get("rope.scaling.factor", 1.0)
            q, k = (_rotated(part, angles, neighbours=architecture == "llama") for part in (q, k))
        k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
        scores[:, ~np.tri(T, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._linear(np.einsum("hqk,khd->qhd", weights, v).reshape(T, H * D), f"{block}.attn_output")


def _rotated(x: Array, angles: Array, neighbours: bool) -> Array:
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = first * cos - second * sin, second * cos + first * sin
    return np.stack(turned, -1).reshape(x.shape) if neighbours else np.concatenate(turned, -1)
